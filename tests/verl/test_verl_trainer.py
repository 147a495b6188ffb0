"""verl's real v1 trainer on a CPU with a tiny model: Ray, TransferQueue, FSDP2, rollouts, weight sync.

    OMP_NUM_THREADS=1 python -m pytest tests/verl/test_verl_trainer.py             # two runs: all channels; stock trainer
    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_trainer.py     # every combination

About a minute a run on 2 cores. `cpu_host/` holds what stands in for the accelerator; verl itself is unpatched.
"""

import importlib.util
import itertools
import re
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
from cpu_run import channel_overrides, run

pytestmark = pytest.mark.timeout(900)


def channels(folder, *overrides, policy=True, sdpo=True, replay_dpo=True, **options):
    """Run `composer_all` with the channels on or off; (exit code, output, metrics per step)."""
    own = channel_overrides(folder, policy=policy, sdpo=sdpo, replay_dpo=replay_dpo)
    return run(folder, *own, *overrides, recipe="composer_all", **options)


def check_channel(steps, name, on, activity):
    """A channel that is on contributes in every step; one that is off leaves no metric."""
    found = [{key: value for key, value in step.items() if key.startswith(f"actor/{name}/")} for step in steps]
    if not on:
        assert found == [{}] * len(steps)
        return
    for step in found:
        assert step[f"actor/{name}/{activity}"] > 0, step
        assert step[f"actor/{name}/loss"] != 0, step


def check_weights_reached_the_engine(output, steps):
    for step in steps:
        assert step["actor/grad_norm"] > 0
        # the engine samples with the weights of the trainer, although it began with others
        assert step["training/rollout_probs_diff_max"] < 1e-5
    moved = [
        (int(step), float(distance))
        for step, distance in re.findall(r"hf_cpu weights at step (\d+): moved (\S+)", output)
    ]
    assert {step for step, distance in moved if distance > 0} == {0, 1, 2, 3}


def test_all_channels_in_one_update_on_two_ranks(tmp_path):
    code, output, steps = channels(tmp_path, ranks=2)
    assert code == 0, output[-6000:]
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    check_weights_reached_the_engine(output, steps)
    check_channel(steps, "sdpo", True, "active_tokens")
    check_channel(steps, "replay_dpo", True, "pairs")
    for step in steps:
        assert step["actor/policy/active_tokens"] > 0 and step["actor/sdpo/hinted_turns"] > 0
        # time and memory of the additional forward, and of the pairs' own work
        assert step["actor/sdpo/teacher_seconds"] > 0 and step["actor/sdpo/teacher_tokens"] > 0
        assert "actor/sdpo/teacher_peak_gb" in step
        assert step["timing_s/sdpo_teacher"] > 0 and step["timing_s/replay_dpo_pairs"] > 0
        assert step["actor/replay_dpo/pairs"] == 3
    assert list((tmp_path / "rollouts").rglob("*.jsonl"))


def test_three_steps_of_dr_grpo_on_the_stock_trainer(tmp_path):
    code, output, steps = run(tmp_path, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2")
    assert code == 0, output[-4000:]
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    check_weights_reached_the_engine(output, steps)
    for step in steps:
        assert step["actor/policy/active_tokens"] > 0
        assert step["actor/policy/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert not [name for name in step if "sdpo" in name or "replay_dpo" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "sdpo", "replay_dpo"),
    [on for on in itertools.product([True, False], repeat=3) if any(on)],
    ids=lambda on: "on" if on else "off",
)
def test_every_combination_of_channels(policy, sdpo, replay_dpo, tmp_path):
    code, output, steps = channels(tmp_path, policy=policy, sdpo=sdpo, replay_dpo=replay_dpo)
    assert code == 0, output[-6000:]
    assert len(steps) == 3
    check_weights_reached_the_engine(output, steps)
    check_channel(steps, "sdpo", sdpo, "active_tokens")
    check_channel(steps, "replay_dpo", replay_dpo, "pairs")
    if policy:
        assert all(step["actor/policy/active_tokens"] > 0 for step in steps)


@pytest.mark.slow
def test_all_channels_off_is_refused_or_moves_nothing(tmp_path):
    code, output, steps = channels(tmp_path, policy=False, sdpo=False, replay_dpo=False)
    if code:
        assert "ConfigError" in output, output[-3000:]
    else:
        assert all(step["actor/grad_norm"] == 0 for step in steps)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["live", "ema", "reference"])
def test_every_teacher(teacher, tmp_path):
    code, output, steps = channels(tmp_path, f"composer.sdpo.teacher.kind={teacher}", replay_dpo=False, ranks=2)
    assert code == 0, output[-6000:]
    check_channel(steps, "sdpo", True, "active_tokens")


@pytest.mark.slow
def test_all_channels_with_dynamic_batches_and_mini_batches(tmp_path):
    """Two optimizer steps per step of the trainer, micro-batches by tokens."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    code, output, steps = channels(
        tmp_path, f"{actor}.ppo_mini_batch_size=2", f"{actor}.use_dynamic_bsz=true",
        f"{actor}.ppo_max_token_len_per_gpu=160", f"{rollout}.log_prob_use_dynamic_bsz=true",
        f"{rollout}.log_prob_max_token_len_per_gpu=160", ranks=2,
    )  # fmt: skip
    assert code == 0, output[-6000:]
    check_channel(steps, "sdpo", True, "active_tokens")
    check_channel(steps, "replay_dpo", True, "pairs")


@pytest.mark.slow
def test_the_policy_recipe_on_two_ranks(tmp_path):
    code, output, steps = run(tmp_path, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", ranks=2)
    assert code == 0 and len(steps) == 3, output[-4000:]
    check_weights_reached_the_engine(output, steps)


@pytest.mark.slow
def test_a_wrong_option_ends_the_run_on_the_driver(tmp_path):
    code, output, metrics = run(tmp_path, "+composer.policy.clip_hihg=0.3")
    assert code != 0 and metrics == []
    assert "Unknown key `composer.policy.clip_hihg`" in output
    assert "Started a local Ray instance" not in output


@pytest.mark.slow
def test_without_plugins_the_name_is_unknown(tmp_path):
    code, output, metrics = run(tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert code != 0 and metrics == []
    assert "composer_dr_grpo" in output
