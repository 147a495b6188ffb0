"""Two real gloo ranks take the same step as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

WORKER = str(Path(__file__).with_name("ranks_worker.py"))


@pytest.fixture
def pairs(tmp_path):
    from composer_plugins.traces.schema import Message, Pair, Provenance, SourceRef
    from composer_plugins.traces.store import Manifest, write_stage

    records = [
        Pair(
            id=str(i),
            state_id=str(i),
            messages=[Message(role="user", content=f"do {i}")],
            chosen=Message(role="assistant", content="yes " * (i + 1)),
            rejected=Message(role="assistant", content=f"no {i}"),
            provenance=Provenance(rule="x", chosen_by=[], rejected_by=[], source_ref=SourceRef(file="f", line=1)),
        )
        for i in range(3)
    ]
    path = tmp_path / "pairs.jsonl"
    write_stage(path, records, Manifest(stage="pairs", record="Pair", written=0))
    return str(path)


@pytest.mark.parametrize("objective", ["dr_grpo", "grpo"])
def test_two_ranks_take_the_same_step_as_one(tmp_path, pairs, objective):
    composer = {
        "policy": {"objective": objective},
        "sdpo": {"weight": 1.0, "hint": {"sources": ["recorded"]}},
        "replay_dpo": {"weight": 0.5, "pairs": pairs, "pairs_per_step": 3},
        "monitor": {"grad_norms_every": 1},
    }
    moves, logs = [], []
    for world in (1, 2):
        result = tmp_path / f"{world}.pt"
        settings = {"output_dir": str(tmp_path / f"out{world}"), "composer": composer, "result": str(result)}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        done = subprocess.run([*launch, WORKER, json.dumps(settings)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        moves.append(torch.load(result, weights_only=True))
        logs.append(json.loads(result.with_suffix(".json").read_text()))
    assert moves[0].norm() > 0
    assert (moves[1] - moves[0]).norm() / moves[0].norm() <= 1e-5
    for name in (
        "sdpo/tokens", "sdpo/hinted_turns", "sdpo/divergence", "sdpo/loss", "sdpo/grad_norm",
        "replay_dpo/pairs", "replay_dpo/loss", "replay_dpo/grad_norm", "policy/active_tokens", "policy/grad_norm",
    ):  # fmt: skip
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name
