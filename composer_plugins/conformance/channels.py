"""What a channel that a plugin adds owes: unreduced values, safe masks, no dependence on how a batch is split."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from composer_plugins.channels.base import ChannelSpec, TokenBatch
from composer_plugins.channels.extra import ExtraChannel
from composer_plugins.conformance.base import Conformance, contract
from composer_plugins.conformance.expected import LENGTH_CONSTANT, relative_l2

GARBAGE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])


def token_batch(seed: int, rows: int = 6, width: int = 7) -> TokenBatch:
    """Draw a batch with rows of different lengths and a tool's tokens in some of them; float64."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < rng.integers(2, width + 1, size=rows)[:, None]
    mask[0] = True
    mask[::2, 2] = False
    logprobs = -rng.random((rows, width)) * 3
    return TokenBatch(
        logprobs=torch.tensor(logprobs).requires_grad_(),
        old_logprobs=torch.tensor(logprobs + 0.2 * rng.normal(size=logprobs.shape)),
        advantages=torch.tensor(np.repeat(rng.normal(size=(rows, 1)), width, axis=1)),
        mask=torch.tensor(mask),
        token_ids=torch.tensor(rng.integers(0, 50, size=(rows, width))),
    )


class ChannelConformance(Conformance):
    """Contracts of a plugin's channel. Override `spec`; `options` and `oracle` as it needs."""

    #: Largest relative L2 distance in float64.
    tolerance: ClassVar[float] = 1e-6

    @abstractmethod
    def spec(self) -> ChannelSpec:
        """Return what the plugin registers."""

    def options(self) -> dict[str, Any]:
        """Options of the channel that the contracts use."""
        return {}

    @abstractmethod
    def oracle(
        self, logprobs: np.ndarray, old_logprobs: np.ndarray, advantages: np.ndarray, token_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return value and gradient of each token (N,), in float64 NumPy from the formula, not from the torch code.

        The gradient is what the optimizer should see: through a stop-gradient it is not the value's derivative.
        """

    def loss(self, batch: TokenBatch, weight: float = 1.0, denominator: float | None = None) -> torch.Tensor:
        """The weighted loss of one batch, its own count as the denominator unless given."""
        spec = self.spec()
        channel = ExtraChannel(spec.name, spec, weight, spec.build(**self.options()))
        units = channel.units(batch.mask, length_constant=LENGTH_CONSTANT)
        return channel.term(batch, units if denominator is None else denominator).loss()

    def gradient(self, batch: TokenBatch, **options: Any) -> np.ndarray:
        """The gradient (B, T) of the loss."""
        return torch.autograd.grad(self.loss(batch, **options), batch.logprobs)[0].numpy()

    @contract()
    def test_values_and_gradients_are_the_oracles(self) -> None:
        batch, spec = token_batch(1), self.spec()
        values, _ = spec.build(**self.options()).values(batch)
        assert values.shape == batch.mask.shape, "one value per token, unreduced"
        kept = batch.mask.numpy()
        inputs = [batch.logprobs.detach(), batch.old_logprobs, batch.advantages, batch.token_ids]
        wanted, slopes = self.oracle(*(x.numpy()[kept] for x in inputs))
        assert relative_l2(values.detach().numpy()[kept], wanted) <= self.tolerance
        found = torch.autograd.grad(values[batch.mask].sum(), batch.logprobs)[0].numpy()[kept]
        assert relative_l2(found, slopes) <= self.tolerance

    @GARBAGE
    @contract()
    def test_garbage_under_the_mask_reaches_nothing(self, value: float) -> None:
        batch = token_batch(2)
        fill = {
            name: torch.where(batch.mask, getattr(batch, name).detach(), value)
            for name in ("logprobs", "old_logprobs", "advantages")
        }
        dirty = replace(batch, **fill)
        dirty.logprobs.requires_grad_()
        assert float(self.loss(dirty)) == pytest.approx(float(self.loss(batch)))
        assert np.array_equal(self.gradient(dirty), self.gradient(batch))

    @contract()
    def test_an_empty_mask_backpropagates_zeros(self) -> None:
        batch = token_batch(3)
        empty = replace(batch, mask=torch.zeros_like(batch.mask))
        loss = self.loss(empty, denominator=1.0)
        assert float(loss) == 0 and not np.any(self.gradient(empty, denominator=1.0))

    @contract()
    def test_micro_batches_change_nothing(self) -> None:
        batch, spec = token_batch(4), self.spec()
        if spec.reduction == "local_token_mean":
            pytest.skip("not offered: a local mean depends on the micro-batch by definition")
        channel = ExtraChannel(spec.name, spec, 1.0, None)
        whole = self.gradient(batch)
        units = channel.units(batch.mask, length_constant=LENGTH_CONSTANT)
        parts = []
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            part = TokenBatch(**{name: getattr(batch, name)[rows].detach() for name in batch.__dataclass_fields__})
            part.logprobs.requires_grad_()
            parts.append(self.gradient(part, denominator=units))
        assert relative_l2(np.concatenate(parts), whole) <= self.tolerance

    @contract()
    def test_padding_changes_nothing(self) -> None:
        batch = token_batch(5)
        pad = {
            name: torch.nn.functional.pad(getattr(batch, name).detach(), (0, 4)) for name in batch.__dataclass_fields__
        }
        padded = TokenBatch(**pad)
        padded.logprobs.requires_grad_()
        width = batch.mask.size(1)
        assert relative_l2(self.gradient(padded)[:, :width], self.gradient(batch)) <= self.tolerance

    @contract()
    def test_the_weight_scales_the_loss(self) -> None:
        batch = token_batch(6)
        assert float(self.loss(batch, weight=2.5)) == pytest.approx(2.5 * float(self.loss(batch)))

    @contract()
    def test_it_says_whether_it_did_anything(self) -> None:
        batch, spec = token_batch(7), self.spec()
        channel = ExtraChannel(spec.name, spec, 1.0, spec.build(**self.options()))
        active = channel.term(batch, 1.0).metrics[spec.activity]
        silent = channel.term(replace(batch, mask=torch.zeros_like(batch.mask)), 1.0).metrics[spec.activity]
        assert active > 0 and silent == 0

    @contract()
    def test_the_same_batch_gives_the_same_numbers(self) -> None:
        assert np.array_equal(self.gradient(token_batch(8)), self.gradient(token_batch(8)))
