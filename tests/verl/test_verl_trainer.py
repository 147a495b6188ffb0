"""verl's real v1 trainer on a CPU with a tiny model: Ray, TransferQueue, FSDP2, rollouts, weight sync.

    OMP_NUM_THREADS=1 python -m pytest tests/verl/test_verl_trainer.py             # two runs: all channels; stock trainer
    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_trainer.py     # every combination

About a minute a run on 2 cores. `cpu_host/` holds what stands in for the accelerator; verl itself is unpatched.
"""

import importlib.util
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
from cpu_run import channel_overrides, run

from composer_plugins.traces.schema import Trace
from composer_plugins.traces.store import read_manifest, read_stage

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


SPECIAL = {"<pad>", "<unk>", "<|im_end|>"}


def words(text):
    """The words of an answer; what ends or fills it is shown by one of the two dumps only."""
    return tuple(word for word in text.split() if word not in SPECIAL)


def check_export(folder, step, groups=4, size=4):
    """The traces of a step are its rollouts: state, action, reward, advantage and feedback; verl's own dump is the oracle."""
    file = folder / "traces" / f"step_{step:06d}.jsonl"
    traces, manifest = list(read_stage(file, Trace)), read_manifest(file)
    dump = [json.loads(line) for line in (folder / f"{step}.jsonl").read_text().splitlines()]
    assert len(traces) == len(dump) == groups * size == manifest.read == manifest.used and manifest.skipped == {}
    found, rewards = Counter(), {}
    for trace in traces:
        (turn,) = trace.steps
        (prompt,) = trace.state_of(turn)
        asked = trace.extra["reward_model"]["ground_truth"]
        assert (prompt.role, prompt.content) == ("user", f"say {asked} please") and turn.history_exact
        assert trace.extra["step"] == step and trace.extra["response_tokens"] > 0
        wrong = f"please say a color not the number two {asked}"
        assert trace.extra.get("feedback") == (None if trace.reward == 1 else wrong)
        found[words(trace.action_of(turn).content), round(trace.reward, 6)] += 1
        rewards.setdefault(trace.extra["uid"], []).append((trace.reward, trace.extra["advantage"]))
    assert found == Counter((words(row["output"]), round(row["score"], 6)) for row in dump)
    assert len(found) > groups  # the answers differ
    assert len(rewards) == groups
    for group in rewards.values():
        mean = sum(reward for reward, _ in group) / size
        assert [advantage for _, advantage in group] == pytest.approx([r - mean for r, _ in group], abs=1e-5)


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
    for step in (1, 2, 3):
        check_export(tmp_path / "rollouts", step)


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
        assert all(step["actor/policy/active_tokens"] > 0 and step["actor/pg_loss"] != 0 for step in steps)
    else:
        assert not [name for step in steps for name in step if name.startswith(("actor/policy/", "actor/pg_"))]


@pytest.mark.slow
def test_all_channels_off_is_refused_on_the_driver(tmp_path):
    """As on every host: nothing would be trained."""
    code, output, steps = channels(tmp_path, policy=False, sdpo=False, replay_dpo=False)
    assert code != 0 and steps == []
    assert "ConfigError" in output and "all weights are 0: nothing would be trained" in output
    assert "Started a local Ray instance" not in output


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["live", "ema", "reference"])
def test_every_teacher(teacher, tmp_path):
    fp32 = (
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    )
    kind = f"composer.sdpo.teacher.kind={teacher}"
    code, output, steps = channels(tmp_path, kind, fp32, replay_dpo=False, ranks=2)
    assert code == 0, output[-6000:]
    check_weights_reached_the_engine(output, steps)
    check_channel(steps, "sdpo", True, "active_tokens")
    assert "reference worker computes in" not in output
    assert all(("actor/sdpo/teacher_weights_gb" in step) == (teacher == "ema") for step in steps)


@pytest.mark.slow
def test_a_channel_that_stays_silent_says_why(tmp_path):
    """The reward function could say something and never does: zeros in the metrics, a warning in the run's output."""
    code, output, steps = channels(
        tmp_path,
        "reward.custom_reward_function.name=compute_score",
        "++composer.monitor.silent_after=2",
        replay_dpo=False,
    )
    assert code == 0 and len(steps) == 3, output[-6000:]
    for step in steps:
        assert (
            step["actor/sdpo/active_tokens"] == step["actor/sdpo/hinted_turns"] == step["actor/sdpo/teacher_rows"] == 0
        )
        assert step["actor/policy/active_tokens"] > 0
    assert "no `feedback` or `hint` in what the reward function returned" in output


@pytest.mark.slow
def test_all_channels_at_level_topk(tmp_path):
    """verl's own logits hook, k fields per response token in TransferQueue, beside pair rows; two ranks."""
    options = ("level=topk", "top_k=5", "alpha=0.5")
    code, output, steps = channels(tmp_path, *[f"++composer.sdpo.{option}" for option in options], ranks=2)
    assert code == 0, output[-6000:]
    check_weights_reached_the_engine(output, steps)
    check_channel(steps, "sdpo", True, "active_tokens")
    check_channel(steps, "replay_dpo", True, "pairs")
    assert all(step["actor/sdpo/divergence"] > 0 for step in steps)  # over entries; of sampled tokens it has any sign


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
