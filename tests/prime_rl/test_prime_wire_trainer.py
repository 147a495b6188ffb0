"""prime-rl's own trainer loop, on a CPU (`cpu_host/`), trains on recorded pairs that our sender deals out."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verifiers.v1", reason="verifiers is not installed (make test-prime-rl)")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "plugins")]

from prime_fixtures import smollm2  # noqa: F401
from test_prime_pairs_sender import Pairs

from composer_plugins.config import ReplayDPOConfig

POLICY = "smollm2"
pytestmark = [pytest.mark.prime_rl, pytest.mark.model]


@pytest.mark.slow
def test_prime_rls_own_trainer_loop_learns_the_pairs(smollm2, tmp_path, prime_tree):  # noqa: F811
    """Two processes: prime-rl's trainer (on a CPU, `cpu_host/`) and the sender, step by step through its broadcasts."""
    from composer_prime_rl.pair_sender import BroadcastWeights, PairSender, record_reference

    from composer_plugins.models.loading import model_dir
    from composer_plugins.models.resolve import resolve_model

    steps = 3
    config = tmp_path / "trainer.toml"
    config.write_text(
        TRAINER.format(out=tmp_path, steps=steps, model=model_dir(resolve_model("smollm2-135m-instruct")))
    )
    path = os.pathsep.join(sys.path)
    with open(tmp_path / "trainer.log", "w") as log:
        trainer = subprocess.Popen(
            [sys.executable, str(HERE / "cpu_host" / "train_cpu.py"), "@", str(config)], stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    try:
        section = ReplayDPOConfig(weight=1.0, beta=0.5, pairs_per_step=2)
        stream, weights = Pairs(), BroadcastWeights(smollm2[0], tmp_path, timeout=240)
        stream.indices = lambda step, **_: [0, 1]
        sender = PairSender(section, stream, tmp_path, seq_len=64)
        margins = []
        for step in range(1, steps + 1):
            weights.load(step - 1)
            if step == 1:
                record_reference(stream, weights.score)
            margins.append(asyncio.run(sender.send(weights.score))["replay_dpo/margin"])
        assert trainer.wait(timeout=240) == 0, (tmp_path / "trainer.log").read_text()[-3000:]
    finally:
        trainer.kill()
    assert margins[0] == pytest.approx(0.0, abs=1e-6) and margins[1] > 0.01 and margins[2] > margins[1]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "loss/mean" in row]) == steps


TRAINER = """
output_dir = "{out}"
max_steps = {steps}
dist_timeout_seconds = 240
[model]
name = "{model}"
seq_len = 64
impl = "hf"
attn = "flash_attention_2"
optim_cpu_offload = false
compile = "None"
ac = "None"
ac_offloading = "None"
fused_lm_head_token_chunk_size = "disabled"
[rollout_transport]
type = "filesystem"
[optim]
lr = 1e-5
[monitors.file]
"""
