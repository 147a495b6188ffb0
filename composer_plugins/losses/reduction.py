"""Reductions with an explicit denominator, so that splitting a batch never changes the gradient.

The loss of an optimizer step is `sum(scale_elements(...)) / sum(count_units(...))`, both sums taken over all
micro-batches and ranks. The numerator is linear and the denominator is a count, so any split gives the same
gradient. `local_token_mean` is the exception by definition: its adapter divides each micro-batch by its own
count and averages the micro-batches.
"""

from __future__ import annotations

from enum import StrEnum

import torch

from composer_plugins.losses.masking import check_same_shape, masked


class Reduction(StrEnum):
    """What a unit of the denominator is."""

    #: Mean over the tokens of a sequence, then over sequences (GRPO, GSPO).
    SEQUENCE_MEAN = "sequence_mean"
    #: Sum over tokens / (sequences x a constant length) (Dr.GRPO).
    CONSTANT_LENGTH = "constant_length"
    #: Mean over the tokens of the local micro-batch (TRL's bnpo).
    LOCAL_TOKEN_MEAN = "local_token_mean"
    #: Mean over the tokens of the global batch (DAPO, CISPO).
    GLOBAL_TOKEN_MEAN = "global_token_mean"


def scale_elements(values: torch.Tensor, mask: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """Return per-token values whose plain sum is the numerator of `reduction`.

    `sequence_mean` divides each token by its own sequence's token count; the other reductions leave the
    values as they are. A row without tokens gives zeros.

    Args:
        values: (B, T) unreduced loss, any unit.
        mask: (B, T) bool.
        reduction: how the objective reduces.

    Returns:
        (B, T), zero outside the mask.

    Raises:
        ValueError: the shapes differ or are not (B, T), or the mask is not bool.

    >>> scale_elements(torch.ones(1, 4), torch.tensor([[True, True, False, False]]), Reduction.SEQUENCE_MEAN)
    tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    _check_rows(values=values, mask=mask)
    values = masked(values, mask)
    if Reduction(reduction) is Reduction.SEQUENCE_MEAN:
        return values / mask.sum(-1, keepdim=True).clamp(min=1)
    return values


def count_units(mask: torch.Tensor, reduction: Reduction, *, length_constant: int | None = None) -> torch.Tensor:
    """Return this micro-batch's contribution to the denominator.

    `sequence_mean`: sequences. `constant_length`: sequences x `length_constant` (a constant, never the
    padded width: that would change with the batch's longest row). Token means: tokens. A row whose mask is
    empty **counts as a sequence**, as in TRL (`.mean()` over rows); verl leaves such rows out unless it is
    given `global_batch_size`. Drop the rows before the call to get that.

    Args:
        mask: (B, T) bool.
        reduction: how the objective reduces.
        length_constant: tokens; needed by `constant_length` only.

    Returns:
        0-dim float tensor on the mask's device, so that it can be all-reduced.

    Raises:
        ValueError: `mask` is not (B, T) bool, or `constant_length` has no positive `length_constant`.

    >>> count_units(torch.tensor([[True, False], [False, False]]), Reduction.SEQUENCE_MEAN)
    tensor(2.)
    """
    _check_rows(mask=mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"Expected a bool mask (True = counts), found {mask.dtype}: pass mask.bool().")
    sequences = torch.tensor(float(mask.size(0)), device=mask.device)
    match Reduction(reduction):
        case Reduction.SEQUENCE_MEAN:
            return sequences
        case Reduction.CONSTANT_LENGTH:
            if length_constant is None or length_constant <= 0:
                raise ValueError(f"constant_length needs a length_constant > 0 in tokens, found {length_constant}.")
            return sequences * length_constant
        case _:
            return mask.sum().float()


def _check_rows(**tensors: torch.Tensor) -> None:
    shape = check_same_shape(**tensors)
    if len(shape) != 2:
        raise ValueError(f"Expected shape (sequences, tokens), found {tuple(shape)}.")
