"""One table of every loss, and the promises that all of them make."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from composer_plugins.channels.policy import policy_term
from composer_plugins.channels.replay_dpo import replay_dpo_term
from composer_plugins.channels.sdpo import sdpo_importance_weight, sdpo_term, sdpo_values
from composer_plugins.config import PolicyConfig, ReplayDPOConfig, SDPOConfig
from composer_plugins.losses import divergence as d
from composer_plugins.losses import dpo, policy
from composer_plugins.losses.reduction import count_units

ROWS, WIDTH, ENTRIES = 4, 6, 7


@dataclass
class Case:
    """A loss: what it takes (name -> (kind, mask name)), which inputs get gradient, and how it is called."""

    name: str
    call: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    inputs: dict[str, tuple[str, str]]
    trained: tuple[str, ...]
    masks: dict[str, str] = field(default_factory=lambda: {"mask": "grid"})


GRID = {"mask": "grid"}
FLAT = {"mask": "flat"}
SIDES = {"chosen_mask": "grid", "rejected_mask": "wide"}
POLICY_INPUTS = {n: ("grid", "mask") for n in ("logprobs", "old_logprobs", "advantages")}
KINDS = {"grid": (ROWS, WIDTH), "wide": (ROWS, WIDTH + 3), "flat": (ROWS,), "entries": (ROWS, ENTRIES)}


def both(kind):
    return {"student": (kind, "mask"), "teacher": (kind, "mask")}


def policy_case(objective, **options) -> Case:
    return Case(
        f"{objective.name} {options or ''}",
        lambda x: policy.policy_loss(objective, **x, **options).values,
        POLICY_INPUTS,
        ("logprobs",),
    )


def divergence_case(function, **options) -> Case:
    return Case(
        f"{function.__name__} {options}",
        lambda x: function(x["student"], x["teacher"], mask=x["mask"], **options),
        both("entries"),
        ("student",),
        FLAT,
    )


def dpo_case(function, **options) -> Case:
    def call(x):
        loss = function(**x, beta=0.5, **options)
        if isinstance(loss, dpo.DPOLoss):
            return loss.values
        return torch.cat([loss.chosen_values.flatten(), loss.rejected_values.flatten()])

    return Case(f"{function.__name__} {options}", call, PAIR_INPUTS, ("chosen_logprobs", "rejected_logprobs"), SIDES)


PAIR_INPUTS = {
    f"{prefix}{side}_logprobs": (kind, f"{side}_mask")
    for side, kind in (("chosen", "grid"), ("rejected", "wide"))
    for prefix in ("", "ref_")
}


def whole_policy_term(x):
    config = PolicyConfig(objective="grpo", kl={"coef": 0.1, "estimator": "k3", "placement": "loss"})
    return policy_term(config, policy.GRPO, **x, denominator=3.0).values


def whole_sdpo_term(x):
    config = SDPOConfig(weight=1.0, level="sampled")
    options = {k: x[k] for k in ("logprobs", "old_logprobs", "teacher_logprobs", "mask")}
    values, divergence = sdpo_values(config, config_level(config), **options)
    weights = {"importance_weights": x["weights"], "mask": x["mask"]}
    return sdpo_term(config, values, denominator=3.0, divergence=divergence, **weights).values


def sampled_from_logits(x):
    config, ids = SDPOConfig(level="sampled"), torch.arange(ROWS)
    logits = {"student_logits": x["student"], "teacher_logits": x["teacher"]}
    return sdpo_values(config, config_level(config), **logits, token_ids=ids, mask=x["mask"])[0]


def config_level(config):
    from composer_plugins.channels.levels import SignalLevel

    return SignalLevel(config.level)


def whole_replay_term(form):
    def call(x):
        config = ReplayDPOConfig(weight=1.0, form=form, label_smoothing=0.1, nll_weight=0.2)
        return replay_dpo_term(config, **x, denominator=4.0).values

    return call


CASES = [
    *(policy_case(o) for o in (policy.GRPO, policy.DR_GRPO, policy.BNPO, policy.DAPO, policy.GSPO, policy.CISPO)),
    policy_case(policy.GRPO, dual_clip=3.0, log_ratio_clamp=20.0),
    policy_case(policy.CISPO, cispo_bound="absolute", clip_high=0.2),
    Case(
        "reference_kl",
        lambda x: policy.reference_kl(**x),
        {n: ("grid", "mask") for n in ("logprobs", "ref_logprobs")},
        ("logprobs",),
    ),
    *(divergence_case(d.full_divergence, alpha=a) for a in (0.0, 0.5, 1.0)),
    divergence_case(d.full_divergence, alpha=0.5, entry_clip=0.05, temperature=1.1),
    *(divergence_case(d.topk_divergence, alpha=a, k=3, tail=t) for a in (0.0, 0.5, 1.0) for t in (True, False)),
    divergence_case(d.topk_divergence, alpha=1.0, k=3, of="teacher"),
    *(divergence_case(d.divergence_from_logprobs, alpha=a) for a in (0.0, 0.5, 1.0)),
    *(divergence_case(d.topk_divergence_from_logprobs, alpha=a, tail=t) for a in (0.0, 0.5, 1.0) for t in (True, False)),
    Case(
        "sampled_reverse_kl",
        lambda x: d.sampled_reverse_kl(**x),
        {n: ("grid", "mask") for n in ("logprobs", "teacher_logprobs")},
        ("logprobs",),
    ),
    *(dpo_case(f, **o) for f in (dpo.dpo_loss, dpo.advantage_form_loss)
      for o in ({}, {"label_smoothing": 0.1}, {"length_normalized": True}, {"nll_weight": 0.5})),
    Case(
        "policy_term",
        whole_policy_term,
        {**POLICY_INPUTS, "ref_logprobs": ("grid", "mask"), "importance_weights": ("grid", "mask")},
        ("logprobs",),
    ),
    Case(
        "sdpo_term",
        whole_sdpo_term,
        {n: ("flat", "mask") for n in ("logprobs", "old_logprobs", "teacher_logprobs", "weights")},
        ("logprobs",),
        FLAT,
    ),
    Case("sdpo sampled from logits", sampled_from_logits, both("entries"), ("student",), FLAT),
    *(Case(f"replay_dpo_term {f}", whole_replay_term(f), PAIR_INPUTS, ("chosen_logprobs", "rejected_logprobs"), SIDES)
      for f in ("direct", "advantage")),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def make(case: Case, *, fill=None, empty=False, dtype=torch.float64, seed=3) -> dict[str, torch.Tensor]:
    """Inputs of a case; `fill` is what lies under the mask."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, kind in case.masks.items():
        mask = torch.rand(KINDS[kind], generator=generator) < 0.6
        mask[..., 0] = True
        mask[-1] = False  # padding, or a whole row without tokens
        result[name] = mask & (not empty)
    for name, (kind, mask_name) in case.inputs.items():
        x = torch.randn(KINDS[kind], generator=generator, dtype=torch.float64)
        if kind == "entries" and "from_logprobs" in case.name:
            x = x.log_softmax(-1) - (1.0 if "topk" in case.name else 0.0)
        elif "logprobs" in name:
            x = -x.abs()
        mask = result[mask_name]
        if fill is not None:
            x = torch.where(mask[:, None] if x.dim() > mask.dim() else mask, x, fill)
        result[name] = x.to(dtype)
    for name in case.trained:
        result[name].requires_grad_()
    return result


def run(case: Case, inputs: dict[str, torch.Tensor]):
    values = case.call(inputs)
    return values, torch.autograd.grad(values.sum(), [inputs[n] for n in case.trained])


@every_case
@pytest.mark.parametrize("fill", [float("inf"), float("-inf"), float("nan")])
def test_nothing_under_the_mask_reaches_value_or_gradient(case, fill):
    values, gradients = run(case, make(case, fill=0.0))
    dirty_values, dirty_gradients = run(case, make(case, fill=fill))
    assert values.isfinite().all()
    assert torch.equal(dirty_values, values)
    for clean, dirty in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(dirty, clean)
        assert clean.count_nonzero() > 0


@every_case
@pytest.mark.parametrize("fill", [0.0, float("-inf"), float("nan")])
def test_an_empty_mask_is_a_differentiable_zero(case, fill):
    inputs = make(case, empty=True, fill=fill)
    values, gradients = run(case, inputs)
    assert values.requires_grad
    assert values.count_nonzero() == 0
    assert all(g.count_nonzero() == 0 for g in gradients)


@every_case
def test_only_the_trained_side_receives_gradient(case):
    inputs = make(case)
    others = [x.requires_grad_() for n, x in inputs.items() if n not in case.trained and x.dtype != torch.bool]
    case.call(inputs).sum().backward()
    assert all(x.grad is None or x.grad.count_nonzero() == 0 for x in others)


@every_case
def test_inputs_are_left_alone_and_values_are_unreduced(case):
    inputs = make(case, fill=7.0)
    before = {n: x.detach().clone() for n, x in inputs.items()}
    values = case.call(inputs)
    assert values.numel() > 1
    for name, x in inputs.items():
        assert torch.equal(x.detach(), before[name])


@every_case
def test_half_precision_is_computed_in_float32(case):
    values, _ = run(case, make(case, dtype=torch.bfloat16))
    rounded = {
        n: x.detach().float() if x.dtype == torch.bfloat16 else x for n, x in make(case, dtype=torch.bfloat16).items()
    }
    for name in case.trained:
        rounded[name].requires_grad_()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, run(case, rounded)[0])


@every_case
def test_a_mask_that_is_not_bool_is_refused(case):
    inputs = make(case)
    for name in case.masks:
        inputs[name] = inputs[name].long()
    with pytest.raises(ValueError, match=r"mask\.bool\(\)"):
        case.call(inputs)


@every_case
def test_shapes_that_do_not_fit_are_refused(case):
    for name in case.inputs:
        inputs = make(case)
        inputs[name] = inputs[name].detach()[:-1]
        with pytest.raises(ValueError, match="Expected"):
            case.call(inputs)


def test_weights_are_safe_under_the_mask():
    config = SDPOConfig()
    mask = torch.tensor([True, False])
    bad = torch.tensor([0.0, float("nan")])
    assert sdpo_importance_weight(config, bad, torch.zeros(2), mask).tolist() == [1.0, 0.0]
    assert count_units(torch.zeros(2, 3, dtype=torch.bool), policy.DAPO.reduction).item() == 0.0
