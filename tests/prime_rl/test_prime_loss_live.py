"""The loss in prime-rl's own hands: its packer, its `setup_*loss*`, its `compute_loss`, from the tree that PRIME_RL names."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.prime_rl

CLIPS = {
    "grpo": (0.8, 1.2),
    "dr_grpo": (0.8, 1.2),
    "bnpo": (0.8, 1.2),
    "dapo": (0.8, 1.28),
    "gspo": (0.9997, 1.0004),
    "cispo": (0.0, 5.0),
}
SEQUENCE = ("grpo", "gspo")
LIVE = {"weight": 0.7, "teacher": {"kind": "live"}}


def load(path):
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


trainer_step = load(Path(__file__).with_name("trainer_step.py"))


@pytest.fixture(scope="module")
def has_weights(prime_loss):
    return "loss_weights" in prime_loss.LossInputs.__dataclass_fields__


@pytest.fixture(scope="module")
def samples(has_weights):
    return trainer_step.random_samples(np.random.default_rng(5), weights=(0, 3) if has_weights else ())


@pytest.fixture
def table(samples):
    return trainer_step.table_of(samples, np.random.default_rng(6), spread=0.6)


def kwargs_for(name, **more):
    return {
        "composer": {"policy": {"objective": name}, **more},
        **({"tokens_per_sample": 6} if name in SEQUENCE else {}),
    }


def configs(module):
    found = {"default": getattr(module, "DefaultLossConfig", None) or module.LossConfig}
    return {**found, **({"ipo": module.IPOLossConfig} if hasattr(module, "IPOLossConfig") else {})}


def test_objective_host_is_the_installed_versions_own_loss(prime_loss, samples, table):
    for kind, config in configs(prime_loss).items():
        for options in ({}, {"kl_tau": 0.01, "adv_tau": 0.5}):
            micro_batches = trainer_step.pack(samples, workers=2)
            own = trainer_step.step(
                prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, config=config(**options))
            )
            kwargs = {"composer": {"policy": {"objective": "host"}}, "host": {"type": kind, **options}}
            ours = trainer_step.step(prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, kwargs=kwargs))
            assert ours.loss == own.loss
            assert np.array_equal(ours.gradient, own.gradient) and own.gradient.any()
            assert own.metrics.items() <= ours.metrics.items()


@pytest.mark.parametrize("kind", ["dppo", "ipo"])
def test_dppo_and_ipo_equal_prime_rls_functions(prime_loss, samples, table, kind):
    config = configs(prime_loss).get({"dppo": "default", "ipo": "ipo"}[kind])
    if config is None or not {"dppo_mask_low", "ipo_threshold"} & set(config.model_fields):
        pytest.skip("this version's default is another loss; objective: host calls it")
    micro_batches = trainer_step.pack(samples)
    for options, ours in (({}, {}), ({"kl_tau": 0.05}, {"kl_tau": 0.05})):
        own = trainer_step.step(
            prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, config=config(**options))
        )
        got = trainer_step.step(
            prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, kwargs={**kwargs_for(kind), **ours})
        )
        assert got.loss == pytest.approx(own.loss, rel=1e-12)
        assert np.linalg.norm(got.gradient - own.gradient) <= 1e-12 * np.linalg.norm(own.gradient)


def test_the_trust_region_drops_tokens(prime_loss, samples, table):
    """Else the two tests above would compare a plain policy gradient."""
    step = trainer_step.step(
        prime_loss, trainer_step.pack(samples), table, trainer_step.rl_loss(prime_loss, kwargs=kwargs_for("dppo"))
    )
    assert max(step.metrics["policy/clip_fraction"]) > 0


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("workers", [1, 3])
def test_every_objective_equals_the_oracle(prime_loss, samples, table, oracle, name, workers):
    micro_batches = trainer_step.pack(samples, workers=workers)
    step = trainer_step.step(
        prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, kwargs=kwargs_for(name))
    )
    values, low_high = table.detach().numpy(), CLIPS[name]
    loss, gradient = 0.0, np.zeros(len(values))
    tokens = sum(np.asarray(counted(s)).sum() for s in samples)
    assert step.rl_tokens == tokens
    for s in samples:
        mask = np.array([counted(s)])
        got, slope = oracle.policy(
            values[s.ids][None], np.array([s.inference]), np.array([s.advantages]), mask,
            level="sequence" if name == "gspo" else "token", surrogate="cispo" if name == "cispo" else "clip",
            low=low_high[0], high=low_high[1],
        )  # fmt: skip
        factor = np.array(s.rl_weights or [1.0] * len(s.ids)) / tokens
        if name in SEQUENCE:
            factor = factor * 6 / max(mask.sum(), 1)
        loss += float((got[0] * factor).sum())
        gradient[s.ids] += slope[0] * factor
    assert step.loss == pytest.approx(loss, rel=1e-6)  # prime-rl carries advantages in float32
    assert np.linalg.norm(step.gradient - gradient) <= 1e-6 * np.linalg.norm(gradient)


def counted(sample):
    weights = sample.rl_weights or [1.0] * len(sample.ids)
    return [m and w != 0 for m, w in zip(sample.mask, weights, strict=True)]


@pytest.mark.parametrize("name", [*CLIPS, "dppo", "ipo", "host"])
def test_packing_and_order_do_not_matter(prime_loss, samples, table, name):
    fn = trainer_step.rl_loss(prime_loss, kwargs={**kwargs_for(name, sdpo=LIVE), "sdpo_route": "loss"})
    one = trainer_step.step(prime_loss, trainer_step.pack(samples), table, fn)
    for other in (trainer_step.pack(samples[::-1], workers=3), trainer_step.pack(samples, seq_len=11)):
        got = trainer_step.step(prime_loss, other, table, fn)
        assert got.loss == pytest.approx(one.loss, rel=1e-9)
        assert np.linalg.norm(got.gradient - one.gradient) <= 1e-9 * np.linalg.norm(one.gradient)


@pytest.mark.parametrize("name", [*CLIPS, "dppo", "host"])
@pytest.mark.parametrize("garbage", [float("inf"), float("nan")])
def test_what_no_mask_counts_has_no_effect(prime_loss, samples, table, name, garbage):
    fn = trainer_step.rl_loss(prime_loss, kwargs={**kwargs_for(name, sdpo=LIVE), "sdpo_route": "loss"})
    micro_batches = trainer_step.pack(samples)
    clean = trainer_step.step(prime_loss, micro_batches, table, fn)
    spoilt = trainer_step.step(prime_loss, micro_batches, table, fn, garbage=garbage)
    assert spoilt.loss == clean.loss and np.array_equal(spoilt.gradient, clean.gradient)


def test_prime_rls_own_loss_minds_that_garbage(prime_loss, samples, table):
    """The reason to make inputs safe before `objective: host`; if this fails, prime-rl has learnt it."""
    config = configs(prime_loss)["default"]
    if "dppo_mask_low" not in config.model_fields:
        pytest.skip("this version's default is another loss")
    fn = trainer_step.rl_loss(prime_loss, config=config())
    assert np.isnan(trainer_step.step(prime_loss, trainer_step.pack(samples), table, fn, garbage=float("inf")).loss)


def test_a_step_of_dummies_only_backpropagates(prime_loss, samples, table):
    import dataclasses

    empty = [dataclasses.replace(s, mask=[False] * len(s.ids), rl_weights=None, reference=None) for s in samples[:2]]
    for name in [*CLIPS, "dppo", "host"]:
        fn = trainer_step.rl_loss(prime_loss, kwargs=kwargs_for(name))
        step = trainer_step.step(prime_loss, trainer_step.pack(empty, workers=3), table, fn)
        assert step.loss == 0.0 and not step.gradient.any() and step.inputs


def test_outputs_are_the_versions_own_class(prime_loss, samples, table):
    fn = trainer_step.rl_loss(prime_loss, kwargs=kwargs_for("dapo"))
    step = trainer_step.step(prime_loss, trainer_step.pack(samples), table, fn)
    assert type(fn(step.inputs[0])) is prime_loss.LossOutputs


def test_sdpo_counts_once_on_either_route(prime_loss, has_weights, table, samples):
    """Route loss: ours alone. Route ref_kl (0.7 and later): prime-rl's component alone, by its own token count."""
    import dataclasses

    def routed(route, stamped):
        rows = [dataclasses.replace(s, rl_weights=None) for s in samples]
        if stamped:
            for row in rows:
                if row.reference:
                    row.ref_kl_weights = [0.7 if r and m else 0.0 for r, m in zip(row.reference, row.mask, strict=True)]
        kwargs = {"composer": {"policy": {"weight": 0}, "sdpo": LIVE}, "sdpo_route": route}
        micro_batches = trainer_step.pack(rows)
        return trainer_step.step(prime_loss, micro_batches, table, trainer_step.rl_loss(prime_loss, kwargs=kwargs))

    values = table.detach().numpy()
    tokens = [
        (token, old, reference)
        for s in samples
        if s.reference
        for token, m, old, reference in zip(s.ids, s.mask, s.inference, s.reference, strict=True)
        if m and reference
    ]
    total = sum(sum(s.mask) for s in samples)
    by_loss, by_ref_kl = np.zeros(len(values)), np.zeros(len(values))
    for token, old, reference in tokens:
        logp = values[token]
        ratio = np.exp(logp - old)
        by_loss[token] += 0.7 * min(ratio, 2.0) * (logp - reference) / total
        kept = np.exp(logp) - np.exp(old) >= -0.2
        by_ref_kl[token] += 0.7 * (kept * ratio * (logp - reference) + 2e-3 * (logp - old)) / len(tokens)
    got = routed("loss", False).gradient
    assert np.linalg.norm(got - by_loss) <= 1e-6 * np.linalg.norm(by_loss)
    assert not routed("ref_kl", False).gradient.any()  # what reaches us on that route does not count
    if has_weights:
        got = routed("ref_kl", True).gradient
        assert np.linalg.norm(got - by_ref_kl) <= 1e-6 * np.linalg.norm(by_ref_kl)


def test_policy_and_sdpo_add_up(prime_loss, samples, table):
    def stepped(**kwargs):
        fn = trainer_step.rl_loss(prime_loss, kwargs=kwargs)
        return trainer_step.step(prime_loss, trainer_step.pack(samples), table, fn)

    both = stepped(composer={"policy": {"objective": "dapo"}, "sdpo": LIVE}, sdpo_route="loss")
    policy = stepped(composer={"policy": {"objective": "dapo"}}).gradient
    sdpo = stepped(composer={"policy": {"weight": 0}, "sdpo": LIVE}, sdpo_route="loss").gradient
    assert np.linalg.norm(both.gradient - policy - sdpo) <= 1e-12 * np.linalg.norm(both.gradient)
    assert np.linalg.norm(sdpo) > 0.01 * np.linalg.norm(policy)
    # the two counts that the docs make the effective weight of sdpo from, where it shares the policy's denominator
    assert sum(both.metrics["policy/tokens"]) == both.rl_tokens
    hinted = sum(bool(r) and c for s in samples if s.reference for r, c in zip(s.reference, counted(s), strict=True))
    assert sum(both.metrics["sdpo/tokens"]) == hinted > 0
