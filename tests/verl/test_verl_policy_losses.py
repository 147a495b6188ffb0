"""The menu as verl policy losses, through verl's own micro-batching and `ppo_loss`."""

import importlib.util
import logging
import math

import numpy as np
import pytest

from composer_plugins.errors import ConfigError

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

MENU = ["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"]
CONSTANT = 16
SPLITS = [
    {}, {"micro": 1}, {"micro": 4}, {"tokens": 14}, {"tokens": 30}, {"ranks": 2}, {"ranks": 2, "micro": 2},
    {"ranks": 4, "micro": 1}, {"ranks": 2, "tokens": 16},
]  # fmt: skip


def expected(oracle, batch, name):
    """Value and gradient of one step by the oracle, reduced as the objective's paper."""
    from composer_plugins.channels.policy import resolve_objective

    objective = resolve_objective(name)
    values, slope = oracle.policy(
        batch.logp, batch.old, batch.adv, batch.mask, level=objective.ratio_level, surrogate=objective.surrogate,
        low=1 - objective.clip_low, high=1 + objective.clip_high,
    )  # fmt: skip
    rows, tokens = batch.rows, batch.mask.sum()
    scale = {
        "grpo": 1 / batch.mask.sum(1, keepdims=True) / rows,
        "gspo": 1 / batch.mask.sum(1, keepdims=True) / rows,
        "dr_grpo": np.full((rows, 1), 1 / (rows * CONSTANT)),
        "dapo": np.full((rows, 1), 1 / tokens),
        "cispo": np.full((rows, 1), 1 / tokens),
        "bnpo": np.full((rows, 1), 1 / tokens),
    }[name]
    return float((values * scale).sum()), slope * scale


@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_each_objective_is_the_oracle_however_the_batch_is_split(name, split, batch, actor, step, oracle, distance):
    if name == "bnpo" and split:
        pytest.skip("bnpo is local to a micro-batch by definition; see the next test")
    value, gradient = expected(oracle, batch, name)
    config = actor(f"composer_{name}", loss_scale_factor=CONSTANT)
    got, got_gradient, _ = step(batch, config, **split)
    assert got == pytest.approx(value, rel=1e-9)
    assert distance(got_gradient, gradient) < 1e-9


@pytest.mark.parametrize("name", MENU)
def test_single_precision_gradients_stay_within_1e5(name, batch, actor, step, oracle, distance):
    import torch

    _, gradient = expected(oracle, batch, name)
    split = {} if name == "bnpo" else {"ranks": 2, "micro": 2}
    got = step(batch, actor(f"composer_{name}", loss_scale_factor=CONSTANT), dtype=torch.float32, **split)
    assert distance(got[1], gradient) < 1e-5


@pytest.mark.parametrize("split", [{"micro": 2}, {"micro": 4}, {"ranks": 2, "micro": 2}], ids=str)
def test_bnpo_is_the_mean_over_micro_batches_of_their_token_means(split, batch, actor, step, oracle, distance):
    values, slope = oracle.policy(
        batch.logp, batch.old, batch.adv, batch.mask, level="token", surrogate="clip", low=0.8, high=1.2
    )
    ranks, micro = split.get("ranks", 1), split["micro"]
    parts = [
        rows[i : i + micro]
        for rows in (list(range(rank, batch.rows, ranks)) for rank in range(ranks))
        for i in range(0, len(rows), micro)
    ]
    value, gradient = 0.0, np.zeros_like(slope)
    for rows in parts:
        tokens = batch.mask[rows].sum()
        value += values[rows].sum() / tokens / len(parts)
        gradient[rows] = slope[rows] / tokens / len(parts)
    got, got_gradient, _ = step(batch, actor("composer_bnpo"), **split)
    assert got == pytest.approx(value, rel=1e-9)
    assert distance(got_gradient, gradient) < 1e-9


# Against verl's own losses


def pair(tensors, ours, theirs, mode):
    """Value and gradient of both loss functions on the same float32 tensors."""
    import torch
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    results = []
    for config in (ours, theirs):
        log_prob = tensors["log_prob"].clone().requires_grad_()
        loss, metrics = get_policy_loss_fn(config.policy_loss.loss_mode)(
            old_log_prob=tensors["old"], log_prob=log_prob, advantages=tensors["adv"], response_mask=tensors["mask"],
            loss_agg_mode=mode, config=config, rollout_is_weights=tensors.get("weights"),
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, log_prob)
        results.append((loss, gradient, metrics))
    return results


def difference(a, b):
    return float((a[0] - b[0]).abs()), float((a[1] - b[1]).abs().max())


@pytest.fixture
def tensors(make_batch):
    import torch

    batch = make_batch(rows=16, width=12, spread=0.8)
    values = {"log_prob": batch.logp, "old": batch.old, "adv": batch.adv}
    tensors = {name: torch.tensor(array, dtype=torch.float32) for name, array in values.items()}
    # one log-ratio beyond verl's clamp of 20, where neither clip hides it: the gradient is 0 with the clamp only
    tensors["old"][0, 0], tensors["adv"][0, 0] = tensors["log_prob"][0, 0] + 25.0, 1.0
    return {**tensors, "mask": torch.tensor(batch.mask)}


AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
BATCH_INFO = [{}, {"dp_size": 2, "batch_num_tokens": 173, "global_batch_size": 32}]
VANILLA = {"policy": {"dual_clip": 3.0, "log_ratio_clamp": 20.0}}


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "is_weights"])
def test_grpo_with_verls_options_is_verls_vanilla_bit_for_bit(mode, info, weighted, tensors, actor):
    import torch

    if weighted:
        tensors["weights"] = torch.rand(tensors["adv"].shape)
    ours = actor("composer_grpo", composer=VANILLA, aggregation="host", global_batch_info=info)
    theirs = actor("vanilla", global_batch_info=info)
    a, b = pair(tensors, ours, theirs, mode)
    assert difference(a, b) == (0.0, 0.0)
    assert a[2]["actor/pg_clipfrac"] > 0 and a[2]["actor/ppo_kl"] == pytest.approx(b[2]["actor/ppo_kl"], rel=1e-5)


def test_without_the_dual_clip_it_is_not_vanilla(tensors, actor):
    """The comparison above must be able to fail: some ratio at a negative advantage is above 3."""
    ours = actor("composer_grpo", composer={"policy": {"log_ratio_clamp": 20.0}}, aggregation="host")
    assert difference(*pair(tensors, ours, actor("vanilla"), "token-mean"))[1] > 1e-3


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_gspo_with_verls_clips_is_verls_gspo(mode, tensors, actor):
    clips = {"policy": {"clip_low": 0.2, "clip_high": 0.2}}
    ours = actor("composer_gspo", composer=clips, aggregation="host")
    a, b = pair(tensors, ours, actor("gspo"), mode)
    # verl multiplies by the mask and we select by it, so the mean of log r may differ in the last bit
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-6)
    assert float((a[1] - b[1]).norm() / b[1].norm()) < 1e-6


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_cispo_with_verls_options_is_verls_cispo_bit_for_bit(mode, tensors, actor):
    options = {"policy": {"clip_low": 0.2, "clip_high": 0.2, "log_ratio_clamp": 20.0}}
    ours = actor("composer_cispo", composer=options, aggregation="host")
    assert difference(*pair(tensors, ours, actor("cispo"), mode)) == (0.0, 0.0)


def test_gspo_by_default_is_per_sequence_and_with_the_papers_clips(tensors, actor):
    """verl's own inherits token-mean and 0.2."""
    a, b = pair(tensors, actor("composer_gspo"), actor("gspo"), "token-mean")
    assert a[2]["actor/pg_clipfrac"] > b[2]["actor/pg_clipfrac"]
    assert abs(float(a[0] - b[0])) > 1e-3


# Masks and weights


@pytest.mark.parametrize("aggregation", ["objective", "host"])
@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan], ids=str)
def test_what_lies_under_the_mask_reaches_neither_value_nor_gradient(name, poison, aggregation, tensors, actor):
    import torch

    config = actor(f"composer_{name}", aggregation=aggregation, loss_scale_factor=CONSTANT)
    tensors["weights"] = torch.rand(tensors["adv"].shape)
    mask, results = tensors["mask"], []
    for dirty in (False, True):
        used = {k: v.clone() for k, v in tensors.items()}
        if dirty:
            for key in ("log_prob", "old", "adv", "weights"):
                used[key][~mask] = poison
        results.append(pair(used, config, config, "seq-mean-token-sum")[0])
    assert (~mask).any() and bool(results[1][1].isfinite().all())
    assert difference(*results) == (0.0, 0.0)
    assert all(math.isfinite(v) for v in results[1][2].values())


@pytest.mark.parametrize("name", MENU)
@pytest.mark.parametrize("info", BATCH_INFO, ids=["local", "global"])
def test_an_empty_mask_backpropagates_zeros(name, info, tensors, actor):
    config = actor(f"composer_{name}", loss_scale_factor=CONSTANT, global_batch_info=info)
    tensors["mask"] = tensors["mask"] & False
    (loss, gradient, metrics), _ = pair(tensors, config, config, "token-mean")
    assert float(loss) == 0.0 and float(gradient.abs().max()) == 0.0
    assert all(math.isfinite(v) for v in metrics.values())


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_rollout_weights_multiply_the_loss_of_each_token(name, batch, actor, step, oracle, distance, rng):
    value, gradient = expected(oracle, batch, name)
    batch.weights = rng.random(batch.mask.shape) * 2
    config = actor(f"composer_{name}", loss_scale_factor=CONSTANT)
    got, got_gradient, _ = step(batch, config, micro=2)
    assert distance(got_gradient, gradient * batch.weights) < 1e-9
    assert got != pytest.approx(value)


def test_the_weight_of_the_channel_scales_the_loss(batch, actor, step, distance):
    plain = step(batch, actor("composer_grpo"))
    half = step(batch, actor("composer_grpo", composer={"policy": {"weight": 0.5}}))
    assert half[0] == pytest.approx(plain[0] / 2)
    assert distance(half[1], plain[1] / 2) < 1e-12


def test_verl_reports_our_metrics(batch, actor, step):
    _, _, metrics = step(batch, actor("composer_grpo"), micro=4)
    assert len(metrics) == 2
    assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "policy/ratio", "policy/active_tokens"} <= set(
        metrics[0]
    )
    assert sum(m["policy/active_tokens"] for m in metrics) == batch.mask.sum()


# Options


def clip_fraction(tensors, config):
    return pair(tensors, config, config, "token-mean")[0][2]["policy/clip_fraction"]


def test_a_clip_of_the_section_wins_then_the_hosts_then_the_papers(actor):
    from composer_verl.section import policy_options

    def clips(name="grpo", **options):
        found, _ = policy_options(actor(f"composer_{name}", **options), name)
        return found.clip_low, found.clip_high, found.dual_clip

    assert clips() == (None, None, None)  # the objective's paper
    assert clips(clip_ratio_low=0.1, clip_ratio_high=0.3) == (0.1, 0.3, None)
    assert clips(clip_ratio_low=None, clip_ratio_high=None, clip_ratio=0.05) == (0.05, 0.05, None)
    assert clips(clip_ratio_c=5.0) == (None, None, 5.0)
    section = {"policy": {"clip_low": 0.02, "dual_clip": 2.0}}
    assert clips(composer=section, clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=5.0) == (0.02, 0.3, 2.0)


def test_clips_that_the_user_set_in_verls_keys_reach_the_loss(tensors, actor):
    assert clip_fraction(tensors, actor("composer_grpo", clip_ratio_low=0.01, clip_ratio_high=0.01)) > clip_fraction(
        tensors, actor("composer_grpo")
    )


def test_dr_grpo_needs_a_constant_length(batch, actor, step):
    with pytest.raises(ConfigError, match=r"loss_scale_factor='\$\{data.max_response_length\}'"):
        step(batch, actor("composer_dr_grpo"))


@pytest.mark.parametrize("options", [{"loss_scale_factor": 10}, {"composer": {"policy": {"length_constant": 10}}}])
def test_dr_grpos_constant_length_from_either_place(options, batch, actor, step):
    long = step(batch, actor("composer_dr_grpo", loss_scale_factor=20))
    assert step(batch, actor("composer_dr_grpo", **options))[0] == pytest.approx(2 * long[0])


def test_the_sections_constant_length_wins(batch, actor, step):
    section = {"policy": {"length_constant": 10}}
    a = step(batch, actor("composer_dr_grpo", composer=section, loss_scale_factor=20))
    assert a[0] == pytest.approx(step(batch, actor("composer_dr_grpo", loss_scale_factor=10))[0])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": {"clip_hihg": 0.3}}, r"Unknown key `composer.policy.clip_hihg`"),
        ({"polciy": {}}, r"Unknown key `composer.polciy`"),
        ({"policy": {"objective": "gspo"}}, r"loss_mode names the objective 'grpo' .* 'gspo'"),
        ({"policy": {"clip_low": -1}}, r"composer.policy.clip_low"),
        ({"sdpo": {"weight": 1.0}}, r"composer.sdpo.weight is 1.0, .* set trainer.v1.trainer_mode=composer"),
        ({"replay_dpo": {"weight": 1.0, "pairs": "x"}}, r"composer.replay_dpo.weight is 1.0, .* set trainer.v1.trainer_mode=composer"),
        ({"channels": {"drift": {"weight": 0.1}}}, r"composer.channels.drift: plugins' channels do not run on verl"),
        ({"policy": {"kl": {"coef": 0.01}}}, r"algorithm.use_kl_in_reward=true .*kl_coef=0.01"),
        ({"policy": {"kl": {"coef": 0.01, "placement": "loss", "estimator": "k3"}}}, r"actor.use_kl_loss=true"),
    ],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_what_a_policy_loss_cannot_do_is_refused_when_verl_builds_its_config(section, message, actor):
    with pytest.raises(ConfigError, match=message):
        actor("composer_grpo", composer=section)


def test_a_section_on_verls_own_loss_is_refused(actor):
    with pytest.raises(ConfigError, match=r"no effect on verl's own loss_mode 'vanilla'"):
        actor("vanilla", composer={"policy": {"clip_low": 0.1}})


def test_an_unknown_aggregation_is_refused(actor):
    with pytest.raises(ConfigError, match="must be objective or host, found 'hosst'"):
        actor("composer_grpo", aggregation="hosst")


def test_a_dual_clip_on_cispo_is_refused(batch, actor, step):
    with pytest.raises(ConfigError, match="composer_cispo has no dual clip"):
        step(batch, actor("composer_cispo", clip_ratio_c=5.0))


def test_an_advantage_in_the_losss_section_is_remarked(actor):
    with pytest.warns(UserWarning, match=r"algorithm.composer.policy.advantage"):
        actor("composer_grpo", composer={"policy": {"advantage": {"eps": 1e-6}}})


def test_an_aggregation_mode_that_does_not_reach_us_is_remarked_once(batch, actor, step, caplog):
    from composer_verl import policy_losses

    policy_losses._remark_unused_aggregation.cache_clear()
    with caplog.at_level(logging.WARNING, logger="composer_verl"):
        for _ in range(2):
            step(batch, actor("composer_grpo", loss_agg_mode="seq-mean-token-sum"), micro=2)
    assert [r.getMessage()[:43] for r in caplog.records] == ["actor.loss_agg_mode seq-mean-token-sum appl"]


def test_several_ranks_without_global_counts_are_refused(tensors, actor):
    config = actor("composer_grpo", global_batch_info={"dp_size": 2})
    with pytest.raises(ConfigError, match="no global batch counts although dp_size is 2"):
        pair(tensors, config, config, "token-mean")


def test_the_outer_loops_figures_are_among_verls_metrics(batch, actor, step, monkeypatch):
    """In every micro-batch the same, so that verl's mean is the value; also where the loss is verl's."""
    import torch
    from composer_verl import outer
    from composer_verl.channel_loss import composer_loss
    from verl.utils import tensordict_utils as tu

    from composer_plugins.config import parse_section

    assert "outer/step" not in step(batch, actor("composer_grpo"))[2][0]

    class Waiting:
        def metrics(self):
            return {"outer/step": 3.0}

    monkeypatch.setattr(outer, "_installed", Waiting())
    *_, seen = step(batch, actor("composer_grpo"), micro=2)
    assert len(seen) > 1 and [metrics["outer/step"] for metrics in seen] == [3.0] * len(seen)
    rows, log_probs = list(range(batch.rows)), torch.tensor(batch.logp)
    data = batch.tensordict(rows, log_probs, torch.float64)
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=int(batch.mask.sum()), global_batch_size=batch.rows)
    section = parse_section({"policy": {"objective": "host", "weight": 0.5}})
    _, metrics = composer_loss(actor("vanilla"), section, batch.model_output(rows, log_probs), data)
    assert metrics["outer/step"].aggregate() == 3.0
