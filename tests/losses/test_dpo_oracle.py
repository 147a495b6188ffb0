"""DPO against the float64 oracle; the advantage form, and what breaks it."""

import numpy as np
import pytest
import torch

from composer_plugins.losses.dpo import advantage_form, advantage_form_loss, dpo_loss, sequence_logprob

VARIANTS = [
    {},
    {"label_smoothing": 0.1},
    {"length_normalized": True},
    {"nll_weight": 0.3},
    {"label_smoothing": 0.2, "length_normalized": True, "nll_weight": 0.5},
]
BETA = 0.7


def pairs(rng, count=4, width=6):
    """Pairs whose actions differ in length on purpose."""
    lengths = rng.integers(1, width + 1, size=(2, count))
    lengths[:, 0] = 1, width
    result = {}
    for side, (name, extra) in enumerate((("chosen", 0), ("rejected", 3))):
        shape = (count, width + extra)
        result[f"{name}_logprobs"] = -rng.random(shape) * 3
        result[f"{name}_mask"] = np.arange(shape[1])[None, :] < lengths[side][:, None]
        result[f"ref_{name}_logprobs"] = -rng.random(shape) * 3
    return result


def tensors(data, dtype=torch.float64):
    result = {k: torch.tensor(v) if v.dtype == bool else torch.tensor(v, dtype=dtype) for k, v in data.items()}
    for name in ("chosen_logprobs", "rejected_logprobs"):
        result[name].requires_grad_()
    return result


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [inputs["chosen_logprobs"], inputs["rejected_logprobs"]])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_value_and_gradient(variant, oracle, rng):
    data = pairs(rng)
    inputs = tensors(data)
    loss = dpo_loss(**inputs, beta=BETA, **variant)
    names = ("chosen_logprobs", "chosen_mask", "ref_chosen_logprobs",
             "rejected_logprobs", "rejected_mask", "ref_rejected_logprobs")  # fmt: skip
    options = {
        "smoothing": variant.get("label_smoothing", 0.0),
        "normalize": variant.get("length_normalized", False),
        "nll": variant.get("nll_weight", 0.0),
    }

    def reference(**changed):
        return oracle.dpo(*[(data | changed)[n] for n in names], BETA, **options)

    values, margins = reference()
    np.testing.assert_allclose(loss.values.detach(), values, atol=1e-12)
    np.testing.assert_allclose(loss.margin.detach(), margins, atol=1e-12)
    for got, name in zip(gradients(loss.values.sum(), inputs), ("chosen_logprobs", "rejected_logprobs"), strict=True):
        expected = oracle.central(lambda x, name=name: reference(**{name: x})[0].sum(), data[name])
        np.testing.assert_allclose(got, expected, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_advantage_form_has_the_same_gradient(variant, dtype, rng):
    inputs = tensors(pairs(rng), dtype)
    direct = gradients(dpo_loss(**inputs, beta=BETA, **variant).values.sum(), inputs)
    form = advantage_form_loss(**inputs, beta=BETA, **variant)
    tokenwise = gradients(form.chosen_values.sum() + form.rejected_values.sum(), inputs)
    assert relative_l2(tokenwise, direct) <= (1e-12 if dtype is torch.float64 else 1e-6)


def relative_l2(got, expected):
    got, expected = (torch.cat([g.flatten() for g in side]) for side in (got, expected))
    return ((got - expected).norm() / expected.norm()).item()


def test_a_mean_per_sequence_breaks_the_advantage_form(rng):
    """Pitfall: a host that averages over the tokens of each sample, when the lengths differ."""
    inputs = tensors(pairs(rng))
    direct = gradients(dpo_loss(**inputs, beta=BETA).values.sum(), inputs)
    form = advantage_form_loss(**inputs, beta=BETA)
    mean = sum(
        (values / mask.sum(-1, keepdim=True)).sum()
        for values, mask in (
            (form.chosen_values, inputs["chosen_mask"]),
            (form.rejected_values, inputs["rejected_mask"]),
        )
    )
    broken = gradients(mean, inputs)
    assert relative_l2(broken, direct) > 0.1
    cosine = sum((a * b).sum() for a, b in zip(broken, direct, strict=True))
    cosine = cosine / (sum(a.square().sum() for a in broken) * sum(b.square().sum() for b in direct)).sqrt()
    assert cosine < 0.99, "not even the direction survives"


def test_advantages_divided_by_their_deviation_break_the_advantage_form(rng):
    """Pitfall: per-pair weights become one size, and the pairs that are already right keep pushing."""
    inputs = tensors(pairs(rng))
    direct = gradients(dpo_loss(**inputs, beta=BETA).values.sum(), inputs)
    loss = dpo_loss(**inputs, beta=BETA)
    s = advantage_form(loss.margin, beta=BETA)
    group = torch.stack([s, -s])
    up, down = group / group.std(0)
    normalised = -(up * sequence_logprob(inputs["chosen_logprobs"], inputs["chosen_mask"])).sum()
    normalised -= (down * sequence_logprob(inputs["rejected_logprobs"], inputs["rejected_mask"])).sum()
    broken = gradients(normalised, inputs)
    best = sum((a * b).sum() for a, b in zip(broken, direct, strict=True)) / sum(a.square().sum() for a in broken)
    assert relative_l2([best * g for g in broken], direct) > 0.1, "no single factor repairs it"


def test_a_stale_advantage_breaks_the_second_inner_step(rng):
    """Pitfall: s depends on the margin, so it is recomputed after every optimizer step."""
    inputs = tensors(pairs(rng))
    stale = advantage_form(dpo_loss(**inputs, beta=BETA).margin, beta=BETA)
    with torch.no_grad():
        inputs["chosen_logprobs"] += 1.0
    fresh = advantage_form(dpo_loss(**inputs, beta=BETA).margin, beta=BETA)
    assert not torch.allclose(stale, fresh, rtol=0.05)
    direct = gradients(dpo_loss(**inputs, beta=BETA).values.sum(), inputs)
    expected = torch.where(inputs["chosen_mask"], -fresh[:, None], 0.0)
    torch.testing.assert_close(direct[0], expected)


def test_a_pair_without_tokens_on_one_side_gives_nothing(rng):
    data = pairs(rng)
    data["rejected_mask"][1] = False
    inputs = tensors(data)
    loss = dpo_loss(**inputs, beta=BETA, nll_weight=1.0)
    chosen, rejected = gradients(loss.values.sum(), inputs)
    assert loss.values[1] == 0
    assert chosen[1].count_nonzero() == 0
    assert rejected[1].count_nonzero() == 0
    assert chosen[0].count_nonzero() > 0
    form = advantage_form_loss(**inputs, beta=BETA, nll_weight=1.0)
    assert form.chosen_values[1].count_nonzero() == 0


def test_a_huge_margin_stays_finite():
    for sign in (-1.0, 1.0):
        one = torch.full((1, 1), sign * 1e4, requires_grad=True)
        zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        loss = dpo_loss(
            chosen_logprobs=one, chosen_mask=mask, ref_chosen_logprobs=zero, rejected_logprobs=zero,
            rejected_mask=mask, ref_rejected_logprobs=zero, beta=1.0,
        )  # fmt: skip
        assert loss.values.isfinite().all()
        assert torch.autograd.grad(loss.values.sum(), one)[0].item() == pytest.approx(-1.0 if sign < 0 else 0.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beta": 0.0}, "beta"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"ref_chosen_logprobs": torch.zeros(4, 2)}, "one shape"),
        ({"chosen_mask": torch.ones(4, 6)}, "bool"),
    ],
)
@pytest.mark.parametrize("function", [dpo_loss, advantage_form_loss])
def test_bad_arguments(function, options, match, rng):
    with pytest.raises(ValueError, match=match):
        function(**(tensors(pairs(rng)) | {"beta": BETA} | options))


def test_as_many_chosen_as_rejected(rng):
    inputs = tensors(pairs(rng))
    for name in ("rejected_logprobs", "rejected_mask", "ref_rejected_logprobs"):
        inputs[name] = inputs[name][:3]
    with pytest.raises(ValueError, match="as many chosen"):
        dpo_loss(**inputs, beta=BETA)
