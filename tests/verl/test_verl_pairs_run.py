"""Channel 3 in verl's real v1 trainer on a CPU: Ray, TransferQueue, two ranks, a resumed run.

    OMP_NUM_THREADS=1 python -m pytest -m slow tests/verl/test_verl_pairs_run.py

About two minutes a run on 2 cores.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "cpu_host"))
from cpu_run import run

from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
from composer_plugins.traces.store import Manifest, write_stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1300)]
TEXTS = [("say red please", "red", "two cat"), ("say a number", "one two", "dog"), ("the color", "green", "dog dog"),
         ("say blue please", "blue blue", "cat"), ("a cat", "cat", "number number red")]  # fmt: skip


def write_pairs(path):
    records = [
        Pair(
            id=f"p{i}", state_id=f"s{i}", messages=[Message(role="user", content=context)],
            chosen=Message(role="assistant", content=chosen), rejected=Message(role="assistant", content=rejected),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i, (context, chosen, rejected) in enumerate(TEXTS)
    ]  # fmt: skip
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return path


def settings(folder, *more):
    return [
        "actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=false", "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", f"composer.replay_dpo.pairs={write_pairs(folder / 'pairs.jsonl')}", "composer.replay_dpo.pairs_per_step=3",
        "composer.replay_dpo.max_length=64", *more,
    ]  # fmt: skip


def pair_metrics(steps):
    return [{k.removeprefix("actor/replay_dpo/"): v for k, v in s.items() if "replay_dpo" in k} for s in steps]


def test_two_ranks_and_a_resumed_run(tmp_path):
    """One update a step, so the margin of a step is that of the weights before it: 0 at first, the reference's own."""
    more = ("trainer.save_freq=1", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
    code, output, steps = run(tmp_path, *settings(tmp_path, *more), recipe="composer_replay_dpo", ranks=2, steps=2)
    assert code == 0, output[-6000:]
    assert [step["training/global_step"] for step in steps] == [1, 2]
    first, second = pair_metrics(steps)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    for name in ("margin", "chosen_shift", "rejected_shift"):  # at temperature 1, though rollouts are sampled at 0.7
        assert abs(first[name]) < 1e-4 < abs(second[name]), name
    for found in (first, second):
        assert found["pairs"] == 3 and found["tokens"] > 0 and found["filler_rows"] == 2
    assert (tmp_path / "run" / "composer_pair_reference.json").exists()
    # what verl says of its rollouts does not count pair rows
    assert all(step["response_length/max"] <= 12 for step in steps)

    (tmp_path / "metrics.jsonl").unlink()
    resume = ("trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path / 'run' / 'global_step_1'}")
    again = settings(tmp_path, *more, *resume)
    code, output, steps = run(tmp_path, *again, recipe="composer_replay_dpo", ranks=2, steps=2)
    assert code == 0, output[-6000:]
    assert [step["training/global_step"] for step in steps] == [2]
    resumed = pair_metrics(steps)[0]
    assert "reference_seconds" not in resumed  # kept from the first run, not scored anew under other weights
    assert resumed["margin"] == pytest.approx(second["margin"], rel=1e-4)  # the same pairs, the same reference


def test_the_frozen_reference_worker_scores_pairs_as_they_are_drawn(tmp_path):
    overrides = settings(
        tmp_path, "actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.optim.lr=1e-12",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=80",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=80", "actor_rollout_ref.ref.fsdp_config.dtype=float32",
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
    )  # fmt: skip
    code, output, steps = run(tmp_path, *overrides, recipe="composer_replay_dpo", steps=2)
    assert code == 0, output[-6000:]
    for found in pair_metrics(steps):
        assert found["pairs"] == 3 and abs(found["margin"]) < 1e-4
    assert not (tmp_path / "run" / "composer_pair_reference.json").exists()
