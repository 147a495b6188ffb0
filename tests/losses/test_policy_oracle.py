"""Policy objectives and advantages against the float64 oracle, value and gradient."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from composer_plugins.losses.advantages import group_advantages
from composer_plugins.losses.policy import (
    BNPO,
    CISPO,
    DAPO,
    DR_GRPO,
    GRPO,
    GSPO,
    Objective,
    policy_loss,
    reference_kl,
)
from composer_plugins.losses.reduction import Reduction, count_units, scale_elements

MENU = [GRPO, DR_GRPO, BNPO, DAPO, GSPO, CISPO]
CONSTANT = 16


def batch(rng, rows=5, width=7, spread=0.4):
    mask = rng.random((rows, width)) < 0.7
    mask[:, 0] = True
    logp = -rng.random((rows, width)) * 3
    old = logp + rng.normal(size=(rows, width)) * spread
    return logp, old, rng.normal(size=(rows, width)), mask


def run(objective, logp, old, adv, mask, dtype=torch.float64, **options):
    x = torch.tensor(logp, dtype=dtype, requires_grad=True)
    loss = policy_loss(
        objective,
        logprobs=x,
        old_logprobs=torch.tensor(old, dtype=dtype),
        advantages=torch.tensor(adv, dtype=dtype),
        mask=torch.tensor(mask),
        **options,
    )
    return x, loss


@pytest.mark.parametrize("objective", MENU, ids=lambda o: o.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.5])
def test_value_and_gradient(objective, dtype, spread, oracle, rng):
    logp, old, adv, mask = batch(rng, spread=spread)
    x, loss = run(objective, logp, old, adv, mask, dtype)
    values, gradient = oracle.policy(
        logp, old, adv, mask, level=objective.ratio_level, surrogate=objective.surrogate,
        low=1 - objective.clip_low, high=1 + objective.clip_high,
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss.values.sum(), x)
    tolerance = 1e-10 if dtype is torch.float64 else 2e-5
    np.testing.assert_allclose(loss.values.detach(), values, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got, gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("objective", "options", "bounds"),
    [
        (GRPO, {"dual_clip": 3.0}, {"dual": 3.0}),
        (GRPO, {"log_ratio_clamp": 0.3}, {"clamp": (-0.3, 0.3)}),
        (GSPO, {"log_ratio_clamp": (-math.inf, 0.1)}, {"clamp": (-math.inf, 0.1)}),
        (GRPO, {"clip_low": 0.1, "clip_high": 0.5}, {"low": 0.9, "high": 1.5}),
        (CISPO, {"cispo_bound": "absolute", "clip_high": 0.2}, {"low": 0.0, "high": 0.2}),
        (CISPO, {"cispo_bound": "absolute"}, {"low": 0.0, "high": 5.0}),
        (CISPO, {"clip_low": 0.2, "clip_high": 0.2}, {"low": 0.8, "high": 1.2}),
    ],
    ids=lambda x: x.name if isinstance(x, Objective) else None,
)
def test_options(objective, options, bounds, oracle, rng):
    logp, old, adv, mask = batch(rng, rows=20, spread=1.5)
    x, loss = run(objective, logp, old, adv, mask, **options)
    _, plain = run(objective, logp, old, adv, mask)
    bounds = {"low": 1 - objective.clip_low, "high": 1 + objective.clip_high} | bounds
    values, gradient = oracle.policy(
        logp, old, adv, mask, level=objective.ratio_level, surrogate=objective.surrogate, **bounds
    )
    (got,) = torch.autograd.grad(loss.values.sum(), x)
    np.testing.assert_allclose(loss.values.detach(), values, atol=1e-10)
    np.testing.assert_allclose(got, gradient, atol=1e-10)
    if options != {"cispo_bound": "absolute"}:
        assert not torch.allclose(loss.values, plain.values), "the option must matter on this data"


def test_the_token_form_of_gspo_has_the_gradient_of_the_sequence_objective(oracle, rng):
    """-1/B sum_b s_b A_b with s_b = exp(mean log r): differentiated as an ordinary function."""
    logp, old, adv, mask = batch(rng, spread=1e-4)
    adv[:] = adv[:, :1]

    def sequence_objective(x):
        s = [math.exp((x[b] - old[b])[mask[b]].mean()) for b in range(len(x))]
        return -sum(s[b] * adv[b, 0] for b in range(len(x))) / len(x)

    x, loss = run(GSPO, logp, old, adv[:, 0], mask)
    mask = torch.tensor(mask)
    total = scale_elements(loss.values, mask, GSPO.reduction).sum() / count_units(mask, GSPO.reduction)
    (got,) = torch.autograd.grad(total, x)
    np.testing.assert_allclose(got, oracle.central(sequence_objective, logp), atol=1e-9)


def test_clipped_marks_exactly_the_tokens_without_gradient(rng):
    logp, old, adv, mask = batch(rng, rows=20)
    x, loss = run(DAPO, logp, old, adv, mask, dual_clip=1.5)
    (gradient,) = torch.autograd.grad(loss.values.sum(), x)
    assert torch.equal(loss.clipped, (gradient == 0) & torch.tensor(mask))
    assert loss.clipped.any()


@pytest.mark.parametrize("reduction", list(Reduction))
def test_reductions(reduction, oracle, rng):
    _, _, values, mask = batch(rng)
    v, m = torch.tensor(values), torch.tensor(mask)
    got = scale_elements(v, m, reduction).sum() / count_units(m, reduction, length_constant=CONSTANT)
    assert got.item() == pytest.approx(oracle.reduce(values, mask, reduction, CONSTANT), abs=1e-12)


def test_an_empty_row_counts_as_a_sequence_as_in_trl():
    mask = torch.tensor([[True, True], [False, False]])
    assert count_units(mask, Reduction.SEQUENCE_MEAN).item() == 2
    assert count_units(mask, Reduction.CONSTANT_LENGTH, length_constant=8).item() == 16
    assert scale_elements(torch.ones(2, 2), mask, Reduction.SEQUENCE_MEAN).sum().item() == 1


def test_the_default_objective_never_uses_the_padded_width():
    narrow, wide = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 50, dtype=torch.bool)
    wide[:, :3] = True
    units = [count_units(m, DR_GRPO.reduction, length_constant=CONSTANT).item() for m in (narrow, wide)]
    assert units == [2 * CONSTANT, 2 * CONSTANT]


def test_k3(oracle, rng):
    logp, ref, _, mask = batch(rng, spread=1.0)
    x = torch.tensor(logp, requires_grad=True)
    values = reference_kl(x, torch.tensor(ref), torch.tensor(mask))
    (got,) = torch.autograd.grad(values.sum(), x)
    want, gradient = oracle.k3(logp, ref, mask)
    np.testing.assert_allclose(values.detach(), want, atol=1e-12)
    np.testing.assert_allclose(got, gradient, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("eps", [1e-4, 1e-6])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("singleton", ["zero", "reward"])
def test_advantages(scale, eps, ddof, singleton, oracle, rng):
    rewards = rng.normal(size=24)
    rewards[[1, 5]] = np.nan
    rewards[8:11] = np.nan  # leaves a group of one scored rollout
    rewards[12:16] = np.nan  # a group that nobody scored
    rewards[16:20] = 0.7
    options = {"scale": scale, "eps": eps, "ddof": ddof, "singleton": singleton}
    got = group_advantages(torch.tensor(rewards), 4, **options)
    np.testing.assert_allclose(got, oracle.advantages(rewards, 4, **options), atol=1e-10)
    assert (got[11] != 0) == (singleton == "reward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("value", "size"), [(0.7, 6), (0.1, 12), (1 / 3, 5), (0.1, 3)])
def test_equal_rewards_give_exact_zeros(value, size, dtype):
    """The mean of three 0.1 is not 0.1; what is left, divided by eps, would look like a signal."""
    assert group_advantages(torch.full((size,), value, dtype=dtype), size).count_nonzero() == 0


@pytest.mark.parametrize(
    ("rewards", "size", "options", "match"),
    [
        (torch.ones(5), 2, {}, "whole groups"),
        (torch.ones(2, 2), 2, {}, r"shape \(N,\)"),
        (torch.tensor([1.0, math.inf]), 2, {}, "finite"),
        (torch.tensor([1, 2]), 2, {}, "floating-point"),
        (torch.ones(2), 2, {"scale": "std"}, "scale"),
        (torch.ones(2), 2, {"singleton": "one"}, "singleton"),
    ],
)
def test_bad_rewards(rewards, size, options, match):
    with pytest.raises(ValueError, match=match):
        group_advantages(rewards, size, **options)


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        (GRPO, {"dual_clip": 1.0}, "dual_clip > 1"),
        (CISPO, {"dual_clip": 3.0}, "clip surrogate"),
        (GRPO, {"clip_low": -0.1}, "clip_low >= 0"),
        (GRPO, {"log_ratio_clamp": 0.0}, "log_ratio_clamp"),
        (CISPO, {"cispo_bound": "both"}, "cispo_bound"),
    ],
)
def test_bad_hyperparameters(objective, options, match, rng):
    with pytest.raises(ValueError, match=match):
        run(objective, *batch(rng), **options)


def test_bad_shapes(rng):
    logp, old, adv, mask = batch(rng)
    with pytest.raises(ValueError, match="Expected advantages"):
        run(GRPO, logp, old, adv[:, :2], mask)
    with pytest.raises(ValueError, match="one shape"):
        run(GRPO, logp, old[:, :2], adv, mask)
    with pytest.raises(ValueError, match="length_constant"):
        count_units(torch.tensor(mask), Reduction.CONSTANT_LENGTH)
    with pytest.raises(ValueError, match="sequences, tokens"):
        count_units(torch.tensor(mask[0]), Reduction.SEQUENCE_MEAN)
    with pytest.raises(ValueError, match="surrogate"):
        dataclasses.replace(GRPO, surrogate="ppo")
