"""Two islands of SmolLM2-135M-Instruct by the recipe and the commands of docs/how-to/diloco.md, on addresses of their own.

python -m pytest -m slow tests/torchft/test_outer_smollm2.py     # about 5 minutes on 2 cores
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness_torchft import free_port

pytest.importorskip("trl", reason="needs TRL: pip install composer-plugins[trl]")

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
RL = [sys.executable, "-m", "composer_plugins.cli"]
HOUSE = "127.0.0.3"


def run(folder: Path, *arguments: object, seconds: float = 300) -> str:
    done = subprocess.run(
        [*RL, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=seconds, errors="replace"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_machines_from_zero(tmp_path):
    data = tmp_path / "runs" / "quickstart"
    run(
        tmp_path,
        "ingest",
        ROOT / "composer_plugins/data/samples/claude_code_session.jsonl",
        "-o",
        data / "traces.jsonl",
    )
    run(tmp_path, "hints", data / "traces.jsonl", "-o", data / "states.jsonl", "--budget", 256, "--tokenizer",
        "smollm2-135m-instruct")  # fmt: skip
    recipe, address = ROOT / "recipes/trl/diloco.yaml", f"http://{HOUSE}:{free_port()}"
    processes = [subprocess.Popen([*RL, "lighthouse", "--bind", address.removeprefix("http://")], cwd=tmp_path)]
    try:
        for i, name in enumerate("ab"):
            environment = {**os.environ, "TORCHFT_LIGHTHOUSE": address, "COMPOSER_ISLAND": name, "COLUMNS": "100"}
            command = [
                *RL, "train", str(recipe), "-o", f"runs/{name}", "--set", f"composer.outer.interface=127.0.0.{i + 1}",
                "--set", "composer.outer.start_with=2", "--set", f"trainer.seed={i + 1}",
            ]  # fmt: skip
            with (tmp_path / f"{name}.out").open("wb") as out:
                processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out))
        said = {}
        for name, process in zip("ab", processes[1:], strict=True):
            code = process.wait(1200)
            said[name] = (tmp_path / f"{name}.out").read_text(errors="replace")
            assert code == 0, said[name][-4000:]
    finally:
        for process in processes:
            process.terminate()
            process.wait(30)
    rounds = [
        [json.loads(line) for line in (tmp_path / "runs" / name / "outer.jsonl").read_text().splitlines()]
        for name in "ab"
    ]
    for first, second in zip(*rounds, strict=True):
        assert first["committed"] and first["participants"] == second["participants"] == 2
        assert first["theta"] == second["theta"] and first["bytes"] == second["bytes"] < 30e6  # the adapter's
    assert [r["outer_step"] for r in rounds[0]] == [1, 2]
    assert len({r["theta"] for r in rounds[0]}) == 2
    adapters = [(tmp_path / "runs" / name / "model" / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]
    for name in "ab":
        assert f"outer loop of island {name}" in said[name] and rounds[0][-1]["theta"][:10] in said[name]
    table = run(tmp_path, "islands", "table", "runs/a/outer.jsonl", "runs/b/outer.jsonl")
    assert table.count(rounds[0][-1]["theta"][:10]) == 2
