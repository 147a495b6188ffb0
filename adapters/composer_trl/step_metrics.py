"""Per-optimizer-step metrics: sums and weighted means that do not depend on how the step was split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


class StepMetrics:
    """Collects (numerator, denominator) pairs over micro-batches and ranks.

    A mean is `sum(value * weight) / sum(weight)`; a total has no denominator. Every rank must use the
    same names (they are declared up front), so that one all-reduce of one small vector is enough.
    """

    def __init__(self, totals: Iterable[str], means: Iterable[str]) -> None:
        self._totals, self._means = sorted(totals), sorted(means)
        self.reset()

    def reset(self) -> None:
        """Forget the step."""
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)

    def knows_total(self, name: str) -> bool:
        """Whether `name` was declared as a total."""
        return name in self._totals

    def declare_mean(self, name: str) -> None:
        """Declare a mean that was not known up front; every rank has to, in the same step."""
        if name not in self._means:
            self._means = sorted([*self._means, name])

    def add(self, name: str, value: float) -> None:
        """Add to a total."""
        self._sums[name] += float(value)

    def mean(self, name: str, value: float, weight: float) -> None:
        """Add a value that stands for `weight` elements to a mean."""
        if weight:
            self._sums[name] += float(value) * float(weight)
            self._weights[name] += float(weight)

    def reduce(self, accelerator) -> dict[str, float]:
        """Return the step's metrics over all ranks; a mean over nothing is NaN. Resets."""
        vector = [self._sums[n] for n in self._totals + self._means] + [self._weights[n] for n in self._means]
        if accelerator.num_processes > 1:
            tensor = torch.tensor(vector, dtype=torch.float64 if accelerator.device.type == "cpu" else torch.float32)
            vector = accelerator.reduce(tensor.to(accelerator.device), reduction="sum").tolist()
        values = dict(zip(self._totals, vector, strict=False))
        sums = vector[len(self._totals) : len(self._totals) + len(self._means)]
        weights = vector[len(self._totals) + len(self._means) :]
        for name, total, weight in zip(self._means, sums, weights, strict=True):
            values[name] = total / weight if weight else float("nan")
        self.reset()
        return values


class GradientProbe:
    """Measures each channel's own parameter-gradient norm, on chosen steps, with one extra backward each."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's share of channel `name`; keeps the graph alive."""
        if not loss.requires_grad:
            return
        grads = torch.autograd.grad(loss, self._parameters, retain_graph=True, allow_unused=True)
        sums = self._sums.setdefault(name, [torch.zeros_like(p) for p in self._parameters])
        for total, grad in zip(sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)

    def norms(self, accelerator, names: Iterable[str]) -> dict[str, float]:
        """Return the L2 norm of each channel's mean gradient over the ranks. Resets."""
        result = {}
        for name in sorted(names):
            sums = self._sums.get(name, [])
            if accelerator.num_processes > 1:
                sums = sums or [torch.zeros_like(p) for p in self._parameters]
                sums = [accelerator.reduce(s, reduction="mean") for s in sums]
            result[name] = float(torch.stack([s.float().norm() for s in sums]).norm()) if sums else 0.0
        self._sums = {}
        return result
