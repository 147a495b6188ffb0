"""The three channels as terms: weights, denominators, metrics, signal levels."""

import logging
import math
import warnings

import pytest
import torch

from composer_plugins.channels import policy as policy_channel
from composer_plugins.channels import replay_dpo as replay_channel
from composer_plugins.channels import sdpo as sdpo_channel
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.policy import policy_term, reference_penalty, resolve_objective
from composer_plugins.channels.replay_dpo import replay_dpo_term
from composer_plugins.channels.sdpo import resolve_level, sdpo_term, sdpo_values
from composer_plugins.config import PolicyConfig, ReplayDPOConfig, SDPOConfig
from composer_plugins.errors import ConfigError, UnsupportedError
from composer_plugins.losses import divergence as d
from composer_plugins.losses.policy import GRPO, reference_kl
from composer_plugins.plugins import get_plugin_manager

FULL, TOPK, SAMPLED = SignalLevel.FULL, SignalLevel.TOPK, SignalLevel.SAMPLED


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"])
def test_objectives_come_through_the_plugin_manager(name):
    assert resolve_objective(name).name == name


def test_unknown_objectives_are_refused():
    with pytest.raises(ConfigError, match="grpo"):
        resolve_objective("gropo")
    with pytest.raises(ConfigError, match="framework's own"):
        resolve_objective("host")


@pytest.mark.parametrize("module", [policy_channel, sdpo_channel, replay_channel])
def test_specs_are_the_registered_ones(module):
    name = module.__name__.rpartition(".")[2]
    assert get_plugin_manager().channels.get(name).load() is module.SPEC
    assert module.SPEC.name == name
    assert module.SPEC.activity.startswith(f"{name}/")


# --- policy ------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens():
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 5, generator=g)
    return {
        "logprobs": logprobs.clone().requires_grad_(),
        "old_logprobs": logprobs + 0.5 * torch.randn(3, 5, generator=g),
        "advantages": torch.tensor([-1.0, 0.0, 1.0]),
        "mask": torch.tensor([[True] * 3 + [False] * 2, [True] * 5, [True] + [False] * 4]),
    }


def test_policy_metrics(tokens):
    term = policy_term(PolicyConfig(weight=0.5), GRPO, **tokens, denominator=3.0)
    assert term.metrics["policy/tokens"] == 9
    assert term.metrics["policy/active_tokens"] == 4
    ratio = (tokens["logprobs"].detach() - tokens["old_logprobs"]).exp()[tokens["mask"]]
    assert term.metrics["policy/ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert 0 < term.metrics["policy/clip_fraction"] < 1
    assert term.loss().item() == pytest.approx(0.5 * term.values.sum().item() / 3.0)
    assert policy_channel.SPEC.activity in term.metrics


def test_zero_advantages_are_no_activity(tokens):
    tokens["advantages"] = torch.zeros(3)
    assert policy_term(PolicyConfig(), GRPO, **tokens, denominator=3.0).metrics["policy/active_tokens"] == 0


def test_importance_weights_multiply_the_policy_loss_and_not_the_kl(tokens):
    ref = tokens["old_logprobs"] + 0.3
    config = PolicyConfig(kl={"coef": 0.2, "estimator": "k3", "placement": "loss"})
    weights = torch.tensor([[0.5], [2.0], [3.0]])
    plain = policy_term(PolicyConfig(), GRPO, **tokens, denominator=1.0).values
    weighted = policy_term(config, GRPO, **tokens, denominator=1.0, importance_weights=weights, ref_logprobs=ref)
    lengths = tokens["mask"].sum(-1, keepdim=True)
    kl = reference_kl(tokens["logprobs"], ref, tokens["mask"])
    torch.testing.assert_close(weighted.values, plain * weights + 0.2 * kl / lengths)
    expected = (plain * weights + 0.2 * kl / lengths).sum()
    gradients = [torch.autograd.grad(x, tokens["logprobs"])[0] for x in (weighted.values.sum(), expected)]
    torch.testing.assert_close(*gradients)
    assert weighted.metrics["policy/kl"] == pytest.approx(kl.sum().item() / 9)


def test_a_kl_in_the_loss_needs_the_reference(tokens):
    config = PolicyConfig(kl={"coef": 0.2, "estimator": "k3", "placement": "loss"})
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_term(config, GRPO, **tokens, denominator=1.0)
    with pytest.raises(ValueError, match="importance_weights"):
        policy_term(PolicyConfig(), GRPO, **tokens, denominator=1.0, importance_weights=torch.ones(3))


def test_a_kl_in_the_reward_is_k1_summed_over_the_sequence(tokens):
    ref = tokens["old_logprobs"].clone()
    ref[~tokens["mask"]] = math.nan
    got = reference_penalty(tokens["logprobs"], ref, tokens["mask"])
    expected = [(tokens["logprobs"] - ref)[i][tokens["mask"][i]].sum().item() for i in range(3)]
    assert got.tolist() == pytest.approx(expected)
    assert not got.requires_grad
    in_reward = PolicyConfig(kl={"coef": 0.2})
    torch.testing.assert_close(
        policy_term(in_reward, GRPO, **tokens, denominator=1.0).values,
        policy_term(PolicyConfig(), GRPO, **tokens, denominator=1.0).values,
    )


# --- sdpo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "host", "expected"),
    [
        ({}, (FULL, TOPK, SAMPLED), FULL),
        ({}, (SAMPLED, TOPK), TOPK),
        ({}, (SAMPLED,), SAMPLED),
        ({"level": "topk"}, (FULL,), TOPK),
        ({"level": "sampled"}, (FULL,), SAMPLED),
        ({"level": "topk", "teacher": {"kind": "trust_region"}, "temperature": 1.1}, (FULL,), TOPK),
        ({"alpha": 0.5, "entry_clip": 0.05}, (TOPK,), TOPK),
    ],
)
def test_the_best_common_level(options, host, expected, caplog):
    with caplog.at_level(logging.INFO):
        assert resolve_level(SDPOConfig(**options), host) is expected
    assert f"signal level {expected}" in caplog.text


@pytest.mark.parametrize(
    ("options", "host", "match"),
    [
        ({"level": "full"}, (SAMPLED,), "best that this host offers is sampled"),
        ({"level": "full"}, (TOPK, SAMPLED), "offers is topk"),
        ({"alpha": 0.0}, (SAMPLED,), "reverse KL"),
        ({"alpha": 0.5}, (SAMPLED,), "alpha: 0.5"),
        ({"entry_clip": 0.05}, (SAMPLED,), "entry_clip"),
        ({"teacher": {"kind": "trust_region"}}, (SAMPLED,), "trust_region"),
        ({"temperature": 1.1}, (SAMPLED,), "temperature"),
        ({"temperature": 1.1, "level": "sampled"}, (FULL,), "temperature"),
        ({"teacher": {"kind": "trust_region"}}, (TOPK,), "trust_region"),
        ({"temperature": 1.1}, (TOPK,), "temperature"),
        ({}, (), "no signal level"),
    ],
)
def test_what_a_level_cannot_give_is_refused(options, host, match):
    with pytest.raises(UnsupportedError, match=match):
        resolve_level(SDPOConfig(**options), host)


@pytest.mark.parametrize("alpha", [0.01, 0.99])
def test_alpha_close_to_an_end_warns_once(alpha):
    with pytest.warns(UserWarning, match="close to its end") as caught:
        resolve_level(SDPOConfig(alpha=alpha), (FULL,))
    assert len(caught) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_other_alphas_do_not_warn(alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_level(SDPOConfig(alpha=alpha), (FULL,))


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    student, teacher, reference = torch.randn(3, 6, 9, generator=g)
    return {"student_logits": student.requires_grad_(), "teacher_logits": teacher, "ref_teacher_logits": reference}


def test_values_at_each_level(logits):
    s, t = logits["student_logits"], logits["teacher_logits"]
    ids = torch.arange(6)
    full, _ = sdpo_values(SDPOConfig(alpha=0.5), FULL, **logits, temperature=0.7)
    torch.testing.assert_close(full, d.full_divergence(s, t, alpha=0.5, temperature=0.7))
    few, _ = sdpo_values(SDPOConfig(alpha=0.5, top_k=3, top_k_of="teacher", tail=False), TOPK, **logits)
    torch.testing.assert_close(few, d.topk_divergence(s, t, alpha=0.5, k=3, of="teacher", tail=False))
    sampled, shown = sdpo_values(SDPOConfig(), SAMPLED, **logits, token_ids=ids, temperature=0.7)
    logp, teacher = ((x / 0.7).log_softmax(-1)[ids, ids] for x in (s, t))
    torch.testing.assert_close(shown, (logp - teacher).detach())
    torch.testing.assert_close(sampled, shown * logp)
    given, _ = sdpo_values(SDPOConfig(), SAMPLED, logprobs=logp, teacher_logprobs=teacher)
    torch.testing.assert_close(given, sampled)
    seen = [x.log_softmax(-1)[:, :3] for x in (s, t)]
    host, _ = sdpo_values(SDPOConfig(alpha=0.5), TOPK, student_topk_logprobs=seen[0], teacher_topk_logprobs=seen[1])
    torch.testing.assert_close(host, d.topk_divergence_from_logprobs(*seen, alpha=0.5))


def test_the_configured_temperature_wins_over_the_rollouts(logits):
    values, _ = sdpo_values(SDPOConfig(temperature=1.1), FULL, **logits, temperature=0.7)
    other, _ = sdpo_values(SDPOConfig(), FULL, **logits, temperature=1.1)
    assert torch.equal(values, other)


def test_trust_region_mixes_the_two_teachers(logits):
    config = SDPOConfig(teacher={"kind": "trust_region", "mix": 0.25})
    values, _ = sdpo_values(config, FULL, **logits)
    mixed = d.trust_region_logits(logits["ref_teacher_logits"], logits["teacher_logits"], mix=0.25)
    torch.testing.assert_close(values, d.full_divergence(logits["student_logits"], mixed, alpha=1.0))
    logits.pop("ref_teacher_logits")
    with pytest.raises(ValueError, match="ref_teacher_logits"):
        sdpo_values(config, FULL, **logits)


def test_the_importance_weight_multiplies_values_and_leaves_the_metric_alone(logits):
    logp = torch.zeros(6)
    old = torch.tensor([0.0, 1.0, -5.0, 0.0, 0.0, 0.0])
    plain, divergence = sdpo_values(SDPOConfig(), FULL, **logits)
    values, shown = sdpo_values(SDPOConfig(is_clip=2.0), FULL, **logits, logprobs=logp, old_logprobs=old)
    torch.testing.assert_close(values, plain * torch.tensor([1.0, math.exp(-1.0), 2.0, 1.0, 1.0, 1.0]))
    assert torch.equal(shown, divergence)
    off, _ = sdpo_values(SDPOConfig(is_clip=None), FULL, **logits, logprobs=logp, old_logprobs=old)
    assert torch.equal(off, plain)


@pytest.mark.parametrize(
    ("level", "match"), [(FULL, "student_logits"), (TOPK, "student_topk_logprobs"), (SAMPLED, "logprobs")]
)
def test_a_missing_tensor_is_named(level, match):
    with pytest.raises(ValueError, match=match):
        sdpo_values(SDPOConfig(), level)


def test_sdpo_metrics_and_floor(logits):
    values, divergence = sdpo_values(SDPOConfig(), FULL, **logits)
    term = sdpo_term(SDPOConfig(weight=0.1), values, denominator=6.0, divergence=divergence)
    assert term.metrics["sdpo/tokens"] == term.metrics["sdpo/active_tokens"] == 6
    assert term.metrics["sdpo/divergence"] == pytest.approx(divergence.mean().item())
    assert term.loss().item() == pytest.approx(0.1 * values.mean().item())
    floored = sdpo_term(SDPOConfig(denominator_floor=60), values, denominator=torch.tensor(6.0), divergence=divergence)
    assert floored.denominator.item() == 60
    weights = torch.linspace(0, 1, 6)
    weighted = sdpo_term(SDPOConfig(), values, denominator=6, divergence=divergence, importance_weights=weights)
    torch.testing.assert_close(weighted.values, values * weights)
    assert weighted.metrics["sdpo/is_weight"] == pytest.approx(0.5)


def test_a_hint_that_moves_nothing_is_no_activity(logits):
    logits["teacher_logits"] = logits["student_logits"].detach() + 1e-6
    values, divergence = sdpo_values(SDPOConfig(), FULL, **logits)
    metrics = sdpo_term(SDPOConfig(), values, denominator=6.0, divergence=divergence).metrics
    assert metrics["sdpo/tokens"] == 6
    assert metrics["sdpo/active_tokens"] == 0


def test_no_hinted_token_at_all_is_a_differentiable_zero(logits):
    empty = {n: x[:0] for n, x in logits.items()}
    values, divergence = sdpo_values(SDPOConfig(), FULL, **empty)
    loss = sdpo_term(SDPOConfig(weight=1.0), values, denominator=0.0, divergence=divergence).loss()
    (gradient,) = torch.autograd.grad(loss, logits["student_logits"])
    assert loss.item() == 0.0
    assert gradient.count_nonzero() == 0


# --- replay_dpo --------------------------------------------------------------------------------------------


@pytest.fixture
def pairs():
    g = torch.Generator().manual_seed(0)
    result = {}
    for side, width in (("chosen", 4), ("rejected", 6)):
        lengths = torch.randint(1, width + 1, (3, 1), generator=g)
        result[f"{side}_logprobs"] = (-torch.rand(3, width, generator=g)).requires_grad_()
        result[f"{side}_mask"] = torch.arange(width) < lengths
        result[f"ref_{side}_logprobs"] = -torch.rand(3, width, generator=g)
    return result


@pytest.mark.parametrize("length_normalized", [False, True])
def test_both_forms_have_one_gradient_and_one_set_of_metrics(length_normalized, pairs):
    gradients, metrics = [], []
    for form in ("direct", "advantage"):
        config = ReplayDPOConfig(
            weight=0.3, beta=0.5, form=form, label_smoothing=0.1, nll_weight=0.2, length_normalized=length_normalized
        )
        term = replay_dpo_term(config, **pairs, denominator=8.0, pair_weights=torch.tensor([1.0, 0.5, 2.0]))
        gradients.append(torch.autograd.grad(term.loss(), [pairs["chosen_logprobs"], pairs["rejected_logprobs"]]))
        metrics.append(term.metrics)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert metrics[0] == metrics[1]


def test_replay_dpo_metrics(pairs):
    pairs["rejected_mask"][2] = False  # no pair without an action on each side
    term = replay_dpo_term(ReplayDPOConfig(beta=0.5), **pairs, denominator=3.0)

    def shift(side, row):
        mask = pairs[f"{side}_mask"][row]
        return (pairs[f"{side}_logprobs"] - pairs[f"ref_{side}_logprobs"])[row][mask].sum().item()

    chosen, rejected = ([shift(side, row) for row in (0, 1)] for side in ("chosen", "rejected"))
    margins = [0.5 * (c - r) for c, r in zip(chosen, rejected, strict=True)]
    assert term.metrics["replay_dpo/pairs"] == 2
    assert term.metrics["replay_dpo/chosen_shift"] == pytest.approx(sum(chosen) / 2)
    assert term.metrics["replay_dpo/rejected_shift"] == pytest.approx(sum(rejected) / 2)
    assert term.metrics["replay_dpo/margin"] == pytest.approx(sum(margins) / 2)
    assert term.metrics["replay_dpo/accuracy"] == sum(m > 0 for m in margins) / 2
    assert term.values[2] == 0


def test_pair_weights_must_fit(pairs):
    with pytest.raises(ValueError, match="pair_weights"):
        replay_dpo_term(ReplayDPOConfig(), **pairs, denominator=3.0, pair_weights=torch.ones(2))


def test_no_pairs_are_a_differentiable_zero(pairs):
    few = {n: x[:0] for n, x in pairs.items()}
    term = replay_dpo_term(ReplayDPOConfig(weight=1.0), **few, denominator=4.0)
    term.loss().backward()
    assert term.metrics["replay_dpo/pairs"] == 0
    assert pairs["chosen_logprobs"].grad.count_nonzero() == 0
