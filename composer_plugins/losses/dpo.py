"""Channel 3: DPO on pairs of actions, pairwise and in advantage form."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from composer_plugins.losses.masking import check_same_shape, masked, safe


class DPOLoss(NamedTuple):
    """Per-pair result, each (P,): `values` and `margin` carry gradient, the shifts are detached.

    A shift is the movement of an action's log-probability against the reference, in nats (per token when
    length-normalised). Watch both: DPO can be content with both falling.
    """

    values: torch.Tensor
    margin: torch.Tensor
    chosen_shift: torch.Tensor
    rejected_shift: torch.Tensor


class AdvantageFormLoss(NamedTuple):
    """`chosen_values` (P, Tc) and `rejected_values` (P, Tr) carry gradient; the rest is (P,) and detached."""

    chosen_values: torch.Tensor
    rejected_values: torch.Tensor
    margin: torch.Tensor
    chosen_shift: torch.Tensor
    rejected_shift: torch.Tensor


def sequence_logprob(logprobs: torch.Tensor, mask: torch.Tensor, *, length_normalized: bool = False) -> torch.Tensor:
    """Return each action's log-probability: the sum over its tokens, or their mean.

    Args:
        logprobs: (P, T), nats, at temperature 1; keeps its gradient.
        mask: (P, T) bool, True on the action's tokens only.
        length_normalized: divide by the action's own token count.

    Returns:
        (P,), nats (nats per token when normalised); 0 for an action without tokens.

    Raises:
        ValueError: the shapes differ or are not (P, T), or the mask is not bool.

    >>> sequence_logprob(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]]), length_normalized=True)
    tensor([-2.])
    """
    shape = check_same_shape(logprobs=logprobs, mask=mask)
    if len(shape) != 2:
        raise ValueError(f"Expected shape (pairs, tokens), found {tuple(shape)}.")
    total = safe(logprobs, mask).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if length_normalized else total


def dpo_margin(
    *,
    chosen_logprobs: torch.Tensor,
    chosen_mask: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    rejected_mask: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    beta: float,
    length_normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (margin, chosen shift, rejected shift), each (P,) with gradient; margin = beta (shift_c - shift_r).

    shift = log pi(action | x) - log pi_ref(action | x). A pair of which one action has no token gets
    margin 0 without gradient.

    Args and Raises: as `dpo_loss`.

    >>> one, two = torch.ones(1, 1), torch.tensor([[True]])
    >>> dpo_margin(
    ...     chosen_logprobs=-one, chosen_mask=two, ref_chosen_logprobs=-3 * one,
    ...     rejected_logprobs=-one, rejected_mask=two, ref_rejected_logprobs=-one, beta=0.5,
    ... )[0]
    tensor([1.])
    """
    if not beta > 0:
        raise ValueError(f"Expected beta > 0, found {beta}.")
    chosen = _shift(chosen_logprobs, ref_chosen_logprobs, chosen_mask, length_normalized)
    rejected = _shift(rejected_logprobs, ref_rejected_logprobs, rejected_mask, length_normalized)
    if chosen.shape != rejected.shape:
        raise ValueError(f"Expected as many chosen as rejected actions, found {len(chosen)} and {len(rejected)}.")
    return masked(beta * (chosen - rejected), whole_pairs(chosen_mask, rejected_mask)), chosen, rejected


def dpo_loss(
    *,
    chosen_logprobs: torch.Tensor,
    chosen_mask: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    rejected_mask: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_weight: float = 0.0,
) -> DPOLoss:
    """Per-pair DPO loss, to be minimised; masked, not reduced over pairs.

    Delta = beta [(log pi(c) - log pi_ref(c)) - (log pi(r) - log pi_ref(r))]
    loss = -(1 - e) log sigmoid(Delta) - e log sigmoid(-Delta) - nll_weight log pi(c) / |c|

    Args:
        chosen_logprobs: (P, Tc), nats, at temperature 1; receives gradient.
        chosen_mask: (P, Tc) bool, True on the action's tokens only.
        ref_chosen_logprobs: (P, Tc), nats; detached inside.
        rejected_logprobs: (P, Tr), receives gradient; the widths Tc and Tr may differ.
        rejected_mask: (P, Tr) bool.
        ref_rejected_logprobs: (P, Tr); detached inside.
        beta: inverse temperature, dimensionless, > 0.
        label_smoothing: e, probability that a preference is flipped, in [0, 0.5).
        length_normalized: divide each action's log-ratio by its own length.
        nll_weight: weight of the chosen action's mean negative log-likelihood, >= 0.

    Returns:
        `DPOLoss`, nats. A pair of which one action has no token gives a differentiable zero.

    Raises:
        ValueError: shapes do not fit, a mask is not bool, or a hyperparameter is out of range.

    Source: DPO arXiv:2305.18290 eq. 7; smoothing: conservative DPO (Mitchell 2023) and trl/trainer/dpo_trainer.py;
    length
    normalisation: Tulu 3 arXiv:2411.15124; NLL term: arXiv:2404.19733 eq. 1.

    >>> one, two = torch.ones(1, 1), torch.tensor([[True]])
    >>> dpo_loss(
    ...     chosen_logprobs=-one, chosen_mask=two, ref_chosen_logprobs=-one,
    ...     rejected_logprobs=-one, rejected_mask=two, ref_rejected_logprobs=-one, beta=0.1,
    ... ).values  # no movement: log 2
    tensor([0.6931])
    """
    _check_options(label_smoothing, nll_weight)
    margin, chosen, rejected = dpo_margin(
        chosen_logprobs=chosen_logprobs,
        chosen_mask=chosen_mask,
        ref_chosen_logprobs=ref_chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        rejected_mask=rejected_mask,
        ref_rejected_logprobs=ref_rejected_logprobs,
        beta=beta,
        length_normalized=length_normalized,
    )
    values = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if nll_weight > 0:
        values = values - nll_weight * sequence_logprob(chosen_logprobs, chosen_mask, length_normalized=True)
    values = masked(values, whole_pairs(chosen_mask, rejected_mask))
    return DPOLoss(values, margin, chosen.detach(), rejected.detach())


def advantage_form(margin: torch.Tensor, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the advantage s = beta (sigmoid(-Delta) - e) that turns a policy loss into DPO; detached.

    s is minus the derivative of the DPO loss with respect to an action's log-ratio: +s on chosen and -s on
    rejected tokens. Recompute it after every optimizer step.

    Args:
        margin: (P,) Delta, dimensionless.
        beta: as in `dpo_loss`.
        label_smoothing: e, as in `dpo_loss`.

    Returns:
        (P,), dimensionless, detached.

    Raises:
        ValueError: beta or label_smoothing out of range.

    Source: derivative of DPO arXiv:2305.18290 eq. 7 (its gradient, section 4).

    >>> advantage_form(torch.zeros(1), beta=0.1)
    tensor([0.0500])
    """
    _check_options(label_smoothing, 0.0)
    if not beta > 0:
        raise ValueError(f"Expected beta > 0, found {beta}.")
    return beta * (torch.sigmoid(-margin.detach()) - label_smoothing)


def advantage_form_loss(
    *,
    chosen_logprobs: torch.Tensor,
    chosen_mask: torch.Tensor,
    ref_chosen_logprobs: torch.Tensor,
    rejected_logprobs: torch.Tensor,
    rejected_mask: torch.Tensor,
    ref_rejected_logprobs: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_weight: float = 0.0,
) -> AdvantageFormLoss:
    """Per-token loss -A logprobs whose plain sum has exactly the gradient of `dpo_loss`; its value differs.

    A = +s on chosen and -s on rejected tokens, with s from `advantage_form`, each divided by the action's
    own length when length-normalised; chosen tokens get nll_weight / |c| on top. For hosts whose loss sees
    one token or one sample at a time. Equal only under a plain sum over tokens, or the sum divided by one
    constant per step: a per-sequence mean breaks it when lengths differ, and so do advantages divided by
    their standard deviation, a clip, an importance weight or a KL term on pair tokens.

    Args and Raises: as `dpo_loss`.

    Source: as `advantage_form`.

    >>> one, two = torch.ones(1, 1), torch.tensor([[True]])
    >>> advantage_form_loss(
    ...     chosen_logprobs=-one, chosen_mask=two, ref_chosen_logprobs=-one,
    ...     rejected_logprobs=-one, rejected_mask=two, ref_rejected_logprobs=-one, beta=0.1,
    ... ).chosen_values
    tensor([[0.0500]])
    """
    _check_options(label_smoothing, nll_weight)
    margin, chosen, rejected = dpo_margin(
        chosen_logprobs=chosen_logprobs.detach(),
        chosen_mask=chosen_mask,
        ref_chosen_logprobs=ref_chosen_logprobs,
        rejected_logprobs=rejected_logprobs.detach(),
        rejected_mask=rejected_mask,
        ref_rejected_logprobs=ref_rejected_logprobs,
        beta=beta,
        length_normalized=length_normalized,
    )
    whole = whole_pairs(chosen_mask, rejected_mask)[:, None]
    s = advantage_form(margin, beta=beta, label_smoothing=label_smoothing)[:, None]
    chosen_length = chosen_mask.sum(-1, keepdim=True).clamp(min=1).to(s.dtype)
    rejected_length = rejected_mask.sum(-1, keepdim=True).clamp(min=1).to(s.dtype)
    up = (s / chosen_length if length_normalized else s) + nll_weight / chosen_length
    down = s / rejected_length if length_normalized else s
    return AdvantageFormLoss(
        masked(-up * safe(chosen_logprobs, chosen_mask), chosen_mask & whole),
        masked(down * safe(rejected_logprobs, rejected_mask), rejected_mask & whole),
        margin,
        chosen,
        rejected,
    )


def whole_pairs(chosen_mask: torch.Tensor, rejected_mask: torch.Tensor) -> torch.Tensor:
    """Return (P,) bool: True where both actions have at least one token."""
    return chosen_mask.any(-1) & rejected_mask.any(-1)


def _shift(logprobs, ref_logprobs, mask, length_normalized: bool) -> torch.Tensor:
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    difference = safe(logprobs, mask) - safe(ref_logprobs.detach(), mask)
    return sequence_logprob(difference, mask, length_normalized=length_normalized)


def _check_options(label_smoothing: float, nll_weight: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"Expected label_smoothing in [0, 0.5), found {label_smoothing}.")
    if not nll_weight >= 0:
        raise ValueError(f"Expected nll_weight >= 0, found {nll_weight}.")
