"""Splitting a batch, padding it wider or on the other side leaves the gradient of the parameters unchanged.

A small linear model makes the log-probabilities, so that the gradient is one vector over shared parameters.
"""

import pytest
import torch

from composer_plugins.channels.policy import policy_term, resolve_objective
from composer_plugins.channels.replay_dpo import replay_dpo_term
from composer_plugins.channels.sdpo import SignalLevel, sdpo_term, sdpo_values
from composer_plugins.config import PolicyConfig, ReplayDPOConfig, SDPOConfig
from composer_plugins.losses.reduction import count_units

ROWS, WIDTH, HIDDEN, VOCABULARY = 8, 12, 16, 24
SPLITS = [[8], [1, 7], [2, 2, 2, 2], [3, 5]]
LAYOUTS = [(0, 0), (0, 5), (5, 0), (0, 50), (2, 3)]
TOLERANCE = 1e-5


@pytest.fixture
def weights():
    return torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()


def make_batch(count=ROWS, seed=1):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (count,), generator=g)
    return {
        "features": torch.randn(count, WIDTH, HIDDEN, generator=g),
        "ids": torch.randint(VOCABULARY, (count, WIDTH), generator=g),
        "offset": torch.randn(count, WIDTH, generator=g) * 0.3,
        "advantages": torch.randn(count, generator=g),
        "mask": torch.arange(WIDTH)[None, :] < lengths[:, None],
    }


def pad(batch, left, right):
    """Pad every (B, T, ...) tensor; what is padded is garbage."""
    result = dict(batch)
    for name, fill in (("features", 3.0), ("ids", 1), ("offset", float("nan")), ("mask", False)):
        x = batch[name]
        shape = list(x.shape)
        parts = []
        for width in (left, right):
            shape[1] = width
            parts.append(torch.full(shape, fill, dtype=x.dtype))
        result[name] = torch.cat([parts[0], x, parts[1]], 1)
    return result


def split(batch, sizes):
    return [
        dict(zip(batch, parts, strict=True)) for parts in zip(*(x.split(sizes) for x in batch.values()), strict=True)
    ]


def logprobs(batch, weights):
    return (batch["features"] @ weights).log_softmax(-1).gather(-1, batch["ids"][..., None])[..., 0]


def policy_gradient(name, micro_batches, weights):
    objective = resolve_objective(name)
    config = PolicyConfig(
        objective=name, clip_low=0.2, clip_high=0.3, kl={"coef": 0.1, "estimator": "k3", "placement": "loss"}
    )
    units = sum(count_units(m["mask"], objective.reduction, length_constant=16) for m in micro_batches)
    total = torch.zeros_like(weights)
    for m in micro_batches:
        logp = logprobs(m, weights)
        old = logp.detach() + m["offset"]
        term = policy_term(
            config, objective, logprobs=logp, old_logprobs=old, advantages=m["advantages"], mask=m["mask"],
            denominator=units, ref_logprobs=old,
        )  # fmt: skip
        total += torch.autograd.grad(term.loss(), weights)[0]
    return total


def sdpo_gradient(config, level, micro_batches, weights):
    count = sum(int(m["mask"].sum()) for m in micro_batches)
    total = torch.zeros_like(weights)
    for m in micro_batches:
        student = m["features"][m["mask"]] @ weights
        teacher = student.detach().roll(1, -1)
        values, divergence = sdpo_values(
            config, level, student_logits=student, teacher_logits=teacher, token_ids=m["ids"][m["mask"]]
        )
        term = sdpo_term(config, values, denominator=float(count), divergence=divergence)
        total += torch.autograd.grad(term.loss(), weights)[0]
    return total


def dpo_gradient(config, micro_batches, weights):
    total = torch.zeros_like(weights)
    for chosen, rejected in micro_batches:
        options = {}
        for side, batch in (("chosen", chosen), ("rejected", rejected)):
            logp = logprobs(batch, weights)
            options |= {
                f"{side}_logprobs": logp,
                f"{side}_mask": batch["mask"],
                f"ref_{side}_logprobs": logp.detach() + batch["offset"],
            }
        term = replay_dpo_term(config, **options, denominator=float(ROWS))
        total += torch.autograd.grad(term.loss(), weights)[0]
    return total


def assert_same(got, expected):
    assert expected.norm() > 1e-3
    assert ((got - expected).norm() / expected.norm()).item() <= TOLERANCE


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_policy(name, layout, sizes, weights):
    batch = make_batch()
    expected = policy_gradient(name, [batch], weights)
    assert_same(policy_gradient(name, split(pad(batch, *layout), sizes), weights), expected)


def test_policy_is_the_same_when_each_micro_batch_has_its_own_width(weights):
    batch = make_batch()
    parts = [pad(m, 0, i * 7) for i, m in enumerate(split(batch, [3, 5]))]
    for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo"):
        assert_same(policy_gradient(name, parts, weights), policy_gradient(name, [batch], weights))


def test_bnpo_ignores_padding(weights):
    batch = make_batch()
    assert_same(policy_gradient("bnpo", [pad(batch, 3, 9)], weights), policy_gradient("bnpo", [batch], weights))


def test_local_denominators_would_change_the_gradient(weights):
    """Why the denominator is an argument: each micro-batch divided by its own count is another loss."""
    batch = make_batch()
    local = sum(policy_gradient("dapo", [m], weights) for m in split(batch, [3, 5])) / 2
    expected = policy_gradient("dapo", [batch], weights)
    assert (local - expected).norm() / expected.norm() > 0.01


@pytest.mark.parametrize("level", list(SignalLevel))
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_sdpo(level, sizes, weights):
    config, batch = SDPOConfig(weight=0.7, top_k=5), make_batch()
    expected = sdpo_gradient(config, level, [batch], weights)
    assert_same(sdpo_gradient(config, level, split(pad(batch, 4, 4), sizes), weights), expected)


@pytest.mark.parametrize("form", ["direct", "advantage"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_replay_dpo(form, sizes, weights):
    config = ReplayDPOConfig(weight=1.0, beta=0.5, form=form, label_smoothing=0.1, nll_weight=0.1)
    chosen, rejected = make_batch(), make_batch(seed=2)
    expected = dpo_gradient(config.model_copy(update={"form": "direct"}), [(chosen, rejected)], weights)
    parts = zip(split(pad(chosen, 2, 1), sizes), split(pad(rejected, 0, 6), sizes), strict=True)
    assert_same(dpo_gradient(config, list(parts), weights), expected)
