"""The loss on `LossInputs` that were recorded from real prime-rl trees (make_records.py); needs no prime-rl.

A result is what prime-rl's `compute_loss` makes of it: the sum over samples, divided by the recorded token count.
"""

import json
import types
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from composer_prime_rl.loss import composer_loss

DATA = Path(__file__).parent / "data"
FILES = sorted(DATA.glob("loss_inputs_*.json"))
RECORDS = {path.stem.removeprefix("loss_inputs_"): json.loads(path.read_text()) for path in FILES}
STEPS = [pytest.param(v, s, id=f"{v}-{s['name']}") for v, r in RECORDS.items() for s in r["steps"]]
CLIPS = {
    "grpo": (0.8, 1.2),
    "dr_grpo": (0.8, 1.2),
    "bnpo": (0.8, 1.2),
    "dapo": (0.8, 1.28),
    "gspo": (0.9997, 1.0004),
    "cispo": (0.0, 5.0),
}
SEQUENCE = ("grpo", "gspo")


def inputs_of(call, dtype=None):
    """A recorded call as an object with exactly the fields that its version has."""
    values = {}
    for name, entry in call.items():
        if entry is None:
            values[name] = None
            continue
        kind = getattr(torch, entry["dtype"])
        tensor = torch.tensor(entry["values"], dtype=kind).reshape(entry["shape"])
        values[name] = tensor.to(dtype) if dtype and kind.is_floating_point else tensor
    values["trainer_logprobs"].requires_grad_(True)
    return types.SimpleNamespace(**values)


def reference_of(inputs):
    return inputs.ref_logprobs if hasattr(inputs, "ref_logprobs") else inputs.teacher_logprobs


def run(step, dtype=torch.float64, change=None, **kwargs):
    """(loss, gradients per call, metrics per call) of a recorded step, divided as prime-rl does."""
    loss, gradients, metrics = 0.0, [], []
    for call in step["calls"]:
        inputs = inputs_of(call, dtype)
        if change is not None:
            change(inputs)
        outputs = composer_loss(inputs, **kwargs)
        outputs.loss.backward()
        loss += float(outputs.loss.detach()) / step["rl_tokens"]
        gradients.append(inputs.trainer_logprobs.grad.double().numpy() / step["rl_tokens"])
        metrics.append(outputs.metrics)
    return loss, gradients, metrics


def policy(name, **options):
    return {"composer": {"policy": {"objective": name, **options}}}


def weights_of(inputs):
    weights = getattr(inputs, "loss_weights", None)
    return np.ones(len(inputs.loss_mask)) if weights is None else weights.numpy()


def expected_policy(oracle, step, name, tokens_per_sample=None, constant=None):
    low, high = CLIPS[name]
    loss, gradients = 0.0, []
    for call in step["calls"]:
        i = inputs_of(call, torch.float64)
        logp, old, adv, mask = (
            np.asarray(t.detach())[None] for t in (i.trainer_logprobs, i.inference_logprobs, i.advantages, i.loss_mask)
        )
        values, slopes = oracle.policy(
            logp, old, adv, mask,
            level="sequence" if name == "gspo" else "token",
            surrogate="cispo" if name == "cispo" else "clip",
            low=low, high=high,
        )  # fmt: skip
        factor = weights_of(i) / step["rl_tokens"]
        if name in SEQUENCE:
            factor = factor * tokens_per_sample / max(mask.sum(), 1)
        if constant:
            factor = factor * tokens_per_sample / constant
        loss += float((values[0] * factor).sum())
        gradients.append(slopes[0] * factor)
    return loss, gradients


def close(got, expected, tolerance=1e-12):
    got, expected = np.concatenate(got), np.concatenate(expected)
    assert np.linalg.norm(got - expected) <= tolerance * max(np.linalg.norm(expected), 1e-30)


def test_the_records_come_from_seven_trees_and_name_their_commits():
    versions = {r["prime_rl"]["version"] for r in RECORDS.values()}
    assert versions == {"0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "0.8.1.dev53", "main-559b447"}
    assert all(len(r["prime_rl"]["commit"]) == 40 for r in RECORDS.values())
    old = {v for v, r in RECORDS.items() if "teacher_logprobs" in r["fields"]}
    assert old == {"0.4.0", "0.5.0", "0.6.0"}
    assert all(("loss_weights" in r["fields"]) == (v not in old) for v, r in RECORDS.items())
    for version, record in RECORDS.items():
        steps = {step["name"]: step for step in record["steps"]}
        assert any(not any(c["loss_mask"]["values"]) for c in steps["empty"]["calls"]), version
        assert any(reference_of(inputs_of(c)) is not None for c in steps["hinted"]["calls"]), version


@pytest.mark.parametrize(("version", "step"), STEPS)
@pytest.mark.parametrize("kind", ["dppo", "ipo"])
def test_dppo_and_ipo_are_prime_rls_own_losses(version, step, kind):
    """Since 0.6 prime-rl's default is DPPO; 0.4 and 0.5 have other defaults, which `objective: host` calls."""
    result = step["results"].get({"dppo": "default", "ipo": "ipo"}[kind])
    if version in ("0.4.0", "0.5.0"):
        assert result is None or "dppo_mask_low" not in result["options"]
        return
    loss, gradients, _ = run(step, torch.float32, **policy(kind))
    assert loss == pytest.approx(result["loss"], rel=1e-6)
    close(gradients, [np.array(g) for g in result["gradients"]], 1e-6)


@pytest.mark.parametrize(("version", "step"), STEPS)
@pytest.mark.parametrize("name", ["dapo", "cispo", "bnpo", "dr_grpo"])
def test_token_objectives_are_exact(oracle, version, step, name):
    loss, gradients, _ = run(step, **policy(name))
    expected, slopes = expected_policy(oracle, step, name)
    assert loss == pytest.approx(expected, rel=1e-12)
    close(gradients, slopes)


@pytest.mark.parametrize(("version", "step"), STEPS)
@pytest.mark.parametrize("name", SEQUENCE)
def test_sequence_objectives_are_exact_up_to_the_assumed_length(oracle, version, step, name):
    loss, gradients, _ = run(step, **policy(name), tokens_per_sample=6)
    expected, slopes = expected_policy(oracle, step, name, tokens_per_sample=6)
    assert loss == pytest.approx(expected, rel=1e-12)
    close(gradients, slopes)


@pytest.mark.parametrize("name", SEQUENCE)
def test_with_the_true_mean_length_the_reduction_is_the_papers(oracle, name):
    step = next(s for s in RECORDS["0.8.0"]["steps"] if s["name"] == "plain")
    rows = [inputs_of(c, torch.float64) for c in step["calls"]]
    mean = step["rl_tokens"] / len(rows)
    width = max(len(r.loss_mask) for r in rows)
    logp, old, adv = (np.zeros((len(rows), width)) for _ in range(3))
    mask = np.zeros((len(rows), width), dtype=bool)
    for b, r in enumerate(rows):
        n = len(r.loss_mask)
        logp[b, :n], old[b, :n] = r.trainer_logprobs.detach(), r.inference_logprobs
        adv[b, :n], mask[b, :n] = r.advantages, r.loss_mask
    low, high = CLIPS[name]
    level = "sequence" if name == "gspo" else "token"
    values, _ = oracle.policy(logp, old, adv, mask, level=level, surrogate="clip", low=low, high=high)
    loss, _, metrics = run(step, **policy(name), tokens_per_sample=mean)
    assert loss == pytest.approx(oracle.reduce(values, mask, "sequence_mean"), rel=1e-12)
    assert np.mean([float(m["policy/tokens"]) for m in metrics]) == pytest.approx(mean)  # what the docs say to read


def test_dr_grpo_with_a_constant_length(oracle):
    step = RECORDS["0.8.0"]["steps"][0]
    loss, gradients, _ = run(step, **policy("dr_grpo", length_constant=50), tokens_per_sample=6)
    expected, slopes = expected_policy(oracle, step, "dr_grpo", tokens_per_sample=6, constant=50)
    assert loss == pytest.approx(expected, rel=1e-12)
    close(gradients, slopes)


def test_aggregation_host_is_the_token_mean(oracle):
    step = RECORDS["0.8.0"]["steps"][0]
    loss, gradients, _ = run(step, **policy("grpo"), aggregation="host")
    expected, slopes = expected_policy(oracle, step, "dr_grpo")  # the same surrogate and clips, a token mean
    assert loss == pytest.approx(expected, rel=1e-12)
    close(gradients, slopes)


@pytest.mark.parametrize(("version", "step"), STEPS)
def test_sdpo_on_the_route_loss(version, step):
    """min(pi/pi_old, 2) (log pi - log pi_T) on tokens with a reference; policy off, so that only this is seen."""
    kwargs = {"composer": {"policy": {"weight": 0}, "sdpo": {"weight": 0.5, "teacher": {"kind": "live"}}}}
    _, gradients, metrics = run(step, **kwargs, sdpo_route="loss")
    expected, tokens = [], 0
    for call in step["calls"]:
        i = inputs_of(call, torch.float64)
        logp, old = i.trainer_logprobs.detach().numpy(), i.inference_logprobs.numpy()
        reference = reference_of(i)
        reference = np.zeros_like(logp) if reference is None else reference.numpy()
        there = i.loss_mask.numpy() & (reference != 0)
        tokens += there.sum()
        slope = np.minimum(np.exp(logp - old), 2.0) * (logp - reference) * weights_of(i)
        expected.append(np.where(there, 0.5 * slope, 0.0) / step["rl_tokens"])
    close(gradients, expected)
    assert sum(float(m["sdpo/tokens"]) for m in metrics) == tokens
    assert sum(float(m["sdpo/active_tokens"]) for m in metrics) == tokens
    assert sum(len(m["sdpo/divergence"]) for m in metrics) == tokens
    assert (tokens > 0) == (step["name"] in ("hinted", "weighted"))


@pytest.mark.parametrize("route", ["ref_kl", "loss"])
def test_one_route_only(route):
    """On ref_kl the reference log-probs reach the loss as well and must not count there."""
    step = next(s for s in RECORDS["main-559b447"]["steps"] if s["name"] == "hinted")
    with_sdpo = {"policy": {"objective": "dapo"}, "sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}}
    loss, gradients, metrics = run(step, composer=with_sdpo, sdpo_route=route)
    plain, plain_gradients, _ = run(step, **policy("dapo"))
    same = np.array_equal(np.concatenate(gradients), np.concatenate(plain_gradients)) and loss == plain
    assert same == (route == "ref_kl")
    assert any("sdpo/tokens" in m for m in metrics) == (route == "loss")


@pytest.mark.parametrize("version", ["0.4.0", "main-559b447"])
@pytest.mark.parametrize("name", [*CLIPS, "dppo", "ipo"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_the_mask_hides_reaches_neither_value_nor_gradient(version, name, bad):
    step = RECORDS[version]["steps"][-1 if version.startswith("main") else 1]
    assert any(reference_of(inputs_of(c)) is not None for c in step["calls"])
    kwargs = {**policy(name), **({"tokens_per_sample": 6.0} if name in SEQUENCE else {}), "sdpo_route": "loss"}
    kwargs["composer"]["sdpo"] = {"weight": 1.0, "teacher": {"kind": "live"}}

    def spoil(inputs):
        for key in vars(inputs):
            value = getattr(inputs, key)
            if value is not None and value.dtype.is_floating_point:
                spoilt = torch.where(inputs.loss_mask, value.detach(), bad)
                setattr(inputs, key, spoilt.requires_grad_(True) if key == "trainer_logprobs" else spoilt)

    clean, spoilt = run(step, **kwargs), run(step, change=spoil, **kwargs)
    assert clean[0] == spoilt[0]
    for a, b, call in zip(clean[1], spoilt[1], step["calls"], strict=True):
        assert np.array_equal(a, b)
        assert not b[~np.array(call["loss_mask"]["values"])].any()


def test_samples_may_come_in_any_order_and_token_objectives_may_be_cut():
    """prime-rl packs and splits as it likes; a mean over tokens does not even notice a sample cut in two."""
    step = next(s for s in RECORDS["main-559b447"]["steps"] if s["name"] == "weighted")

    def cut(call):
        halves = [{}, {}]
        for name, entry in call.items():
            n = len(call["loss_mask"]["values"]) // 2
            for half, part in zip(halves, (slice(None, n), slice(n, None)), strict=True):
                half[name] = entry and {"dtype": entry["dtype"], "values": entry["values"][part]}
                if entry:
                    half[name]["shape"] = [len(half[name]["values"])]
        return halves

    for name in CLIPS:
        options = {"tokens_per_sample": 5} if name in SEQUENCE else {}
        loss, gradients, _ = run(step, **policy(name), **options)
        other, turned, _ = run({**step, "calls": step["calls"][::-1]}, **policy(name), **options)
        assert other == pytest.approx(loss, rel=1e-12)
        close(turned[::-1], gradients)
        if name not in SEQUENCE:
            parts = {**step, "calls": [half for call in step["calls"] for half in cut(call)]}
            halved, pieces, _ = run(parts, **policy(name), **options)
            assert halved == pytest.approx(loss, rel=1e-12)
            close(pieces, gradients)


@pytest.mark.parametrize("version", RECORDS)
def test_an_empty_mask_gives_a_differentiable_zero(version):
    step = next(s for s in RECORDS[version]["steps"] if s["name"] == "empty")
    empty = [call for call in step["calls"] if not any(call["loss_mask"]["values"])]
    assert empty
    for name in [*CLIPS, "dppo", "ipo"]:
        options = {"tokens_per_sample": 5} if name in SEQUENCE else {}
        for call in empty:
            inputs = inputs_of(call)
            outputs = composer_loss(inputs, **policy(name), **options)
            assert outputs.loss.shape == () and outputs.loss.requires_grad
            outputs.loss.backward()
            assert float(outputs.loss.detach()) == 0.0
            assert not inputs.trainer_logprobs.grad.any()
            assert all(bool(torch.isfinite(m).all()) for m in outputs.metrics.values())


def test_weight_0_computes_nothing(monkeypatch):
    """Not even looked at: nan inside the mask stays without effect, and neither term is called."""
    import composer_prime_rl.loss as module

    def fail(*args, **kwargs):
        raise AssertionError("computed although its weight is 0")

    monkeypatch.setattr(module, "policy_loss", fail)
    monkeypatch.setattr(module, "sdpo_values", fail)
    call = next(s for s in RECORDS["0.8.0"]["steps"] if s["name"] == "hinted")["calls"][0]
    inputs = inputs_of(call)
    inputs.advantages = torch.full_like(inputs.advantages, float("nan"))
    composer = {"policy": {"weight": 0}, "sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}}
    outputs = composer_loss(inputs, composer=composer)  # route ref_kl: prime-rl's component has it
    outputs.loss.backward()
    assert float(outputs.loss.detach()) == 0.0 and outputs.metrics == {}
    assert not inputs.trainer_logprobs.grad.any()
    with pytest.raises(AssertionError, match="weight is 0"):
        composer_loss(inputs, composer=composer, sdpo_route="loss")


def test_advantages_that_are_none_or_nan_are_zero():
    call = RECORDS["0.8.0"]["steps"][0]["calls"][0]
    for advantages in (None, torch.full((len(call["loss_mask"]["values"]),), float("nan"))):
        inputs = inputs_of(call)
        inputs.advantages = advantages
        outputs = composer_loss(inputs, **policy("dapo"))
        outputs.loss.backward()
        assert float(outputs.loss.detach()) == 0.0 and float(outputs.metrics["policy/active_tokens"]) == 0.0
        assert not inputs.trainer_logprobs.grad.any()


def test_reference_logprobs_that_are_not_finite_are_none():
    call = next(s for s in RECORDS["0.8.0"]["steps"] if s["name"] == "hinted")["calls"][0]
    inputs = inputs_of(call)
    inputs.ref_logprobs = torch.full_like(inputs.ref_logprobs, float("-inf"))
    composer = {"policy": {"weight": 0}, "sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}}
    outputs = composer_loss(inputs, composer=composer, sdpo_route="loss")
    assert float(outputs.metrics["sdpo/tokens"]) == 0 and float(outputs.loss.detach()) == 0


def test_a_certain_teacher_is_told_from_none():
    from composer_prime_rl.reference import stamped

    call = next(s for s in RECORDS["0.8.0"]["steps"] if s["name"] == "hinted")["calls"][0]
    composer = {"policy": {"weight": 0}, "sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}}
    counts = []
    for values in ([0.0] * len(call["loss_mask"]["values"]), stamped([0.0] * len(call["loss_mask"]["values"]))):
        inputs = inputs_of(call)
        inputs.ref_logprobs = torch.tensor(values, dtype=torch.float32)
        counts.append(float(composer_loss(inputs, composer=composer, sdpo_route="loss").metrics["sdpo/tokens"]))
    assert counts == [0.0, float(sum(call["loss_mask"]["values"]))]


def test_metric_names_are_those_of_the_other_hosts():
    step = next(s for s in RECORDS["main-559b447"]["steps"] if s["name"] == "hinted")
    composer = {"policy": {"objective": "dapo"}, "sdpo": {"weight": 1.0, "teacher": {"kind": "live"}}}
    _, _, metrics = run(step, composer=composer, sdpo_route="loss")
    names = {"policy/tokens", "policy/active_tokens", "policy/ratio", "policy/clip_fraction"}
    names |= {"sdpo/tokens", "sdpo/active_tokens", "sdpo/divergence"}
    assert all(set(m) == names for m in metrics)
    dims = {name: {m[name].dim() for m in metrics} for name in names}  # compute_loss stacks or concatenates
    assert dims == {name: {1 if name == "sdpo/divergence" else 0} for name in names}
    assert not any(value.requires_grad for m in metrics for value in m.values())
    ratio = np.exp(
        [
            float((a - b).detach())
            for c in step["calls"]
            for i in [inputs_of(c, torch.float64)]
            for a, b, m in zip(i.trainer_logprobs, i.inference_logprobs, i.loss_mask, strict=True)
            if m
        ]
    )
    tokens = [float(m["policy/tokens"]) for m in metrics]
    assert np.average([float(m["policy/ratio"]) for m in metrics], weights=tokens) == pytest.approx(ratio.mean())
