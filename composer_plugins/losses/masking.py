"""Masks, applied twice: inputs made safe before any arithmetic, results zeroed after it.

Zeroing only the result is not enough: with `-inf` under the mask the value is right, but the gradient is
`0 * inf = nan`. Every loss of the core goes through both functions.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def safe(x: torch.Tensor, mask: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """Return `x` where `mask` is True and `fill` elsewhere, in at least float32.

    Whatever lies under the mask (inf, nan) reaches neither what is computed from the result nor, through
    `torch.where`'s backward, the gradient of `x`.

    Args:
        x: any shape; keeps its gradient where `mask` is True.
        mask: bool, broadcastable to `x`; True = counts.
        fill: the harmless stand-in (0 for log-probabilities, advantages and logits, 1 for factors).

    Raises:
        ValueError: `mask` is not bool, or does not broadcast to the shape of `x`.

    >>> safe(torch.tensor([-1.0, float("-inf")]), torch.tensor([True, False]))
    tensor([-1.,  0.])
    """
    x = full_precision(x)
    check_mask(mask, x.shape)
    return torch.where(mask, x, torch.as_tensor(fill, dtype=x.dtype, device=x.device))


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return `values` with exact zeros where `mask` is False; a differentiable zero when it is all False.

    Args:
        values: what was computed from safe inputs, any shape.
        mask: bool, broadcastable to `values`.

    Raises:
        ValueError: as `safe`.

    >>> masked(torch.tensor([2.0, 3.0]), torch.tensor([False, True]))
    tensor([0., 3.])
    """
    return safe(values, mask, 0.0)


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32 when it is half precision (exp of a bf16 difference is too coarse), else as it is."""
    return x.float() if x.dtype in HALF else x


def check_mask(mask: torch.Tensor, shape: torch.Size) -> None:
    """Raise `ValueError` unless `mask` is bool and broadcasts to `shape`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"Expected a bool mask (True = counts), found {mask.dtype}: pass mask.bool().")
    try:
        fits = torch.broadcast_shapes(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"Expected a mask that broadcasts to {tuple(shape)}, found shape {tuple(mask.shape)}.")


def check_same_shape(**tensors: torch.Tensor | None) -> torch.Size:
    """Return the one shape of all tensors that are not None. Raises `ValueError` that lists the shapes."""
    shapes = {name: t.shape for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"Expected tensors of one shape, found {found}.")
    return next(iter(shapes.values()))
