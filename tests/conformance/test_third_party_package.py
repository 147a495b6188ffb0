"""The example package: installed from outside, found through its entry point, used from a recipe, conformant."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "examples/third_party"
TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import build_model, build_tokenizer, letters_reward
from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer
from datasets import Dataset
from composer_plugins.config import read_yaml

channels = read_yaml(Path({recipe!r}))["composer"]["channels"]
channels["acme_drift"]["options"]["margin"] = 0.0
tokenizer = build_tokenizer()
args = ComposerGRPOConfig(
    output_dir={out!r}, per_device_train_batch_size=4, num_generations=4, max_completion_length=8, max_steps=2,
    num_iterations=2, learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, bf16=False,
    disable_tqdm=True, gradient_checkpointing=False, seed=7, composer={{"channels": channels}},
)
rows = Dataset.from_list([{{"prompt": [{{"role": "user", "content": f"count {{i}}"}}]}} for i in range(4)])
trainer = ComposerGRPOTrainer(build_model(tokenizer), letters_reward, args, rows, processing_class=tokenizer)
trainer.train()
print("METRICS", __import__("json").dumps(trainer.state.log_history[1]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package, installed with pip into a folder of its own (built in a copy, so that none of it stays here)."""
    pytest.importorskip("setuptools", reason="building a package needs setuptools, which this environment lacks")
    base = tmp_path_factory.mktemp("acme")
    shutil.copytree(PACKAGE, base / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", base / "site", base / "source"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return base / "site"


def python(*arguments, site, cwd):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def composer_rl(*arguments, site, cwd):
    return python("-m", "composer_plugins.cli", *arguments, site=site, cwd=cwd)


def test_the_package_is_small():
    files = [p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".toml", ".yaml") and "__pycache__" not in p.parts]
    assert sum(len(path.read_text().splitlines()) for path in files) < 200


def test_the_how_to_shows_the_channel_as_it_is():
    page = (PACKAGE.parents[1] / "docs/how-to/write-a-channel.md").read_text()
    assert (PACKAGE / "acme_agent/drift.py").read_text() in page
    for name in ("acme_agent/plugin.py", "test_acme.py"):
        assert any(part in page for part in (PACKAGE / name).read_text().split("\n\n\n") if "rift" in part), name


def test_it_is_found_through_its_entry_point(site, tmp_path):
    listed = composer_rl("plugins", site=site, cwd=tmp_path).stdout
    for name in ("acme_drift", "acme", "acme_rules"):
        assert name in listed


def test_it_is_conformant(site, tmp_path):
    report = tmp_path / "acme.json"
    done = composer_rl("conformance", PACKAGE / "test_acme.py", "--report", report, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(report.read_text())["counts"]
    assert counts["passed"] > 30 and not counts.get("failed")
    assert set(json.loads(report.read_text())["suites"]) == {"TestDrift", "TestReader", "TestRules"}


def documented() -> list[list[list[str]]]:
    """The `composer-rl` commands of the README, block by block."""
    text = (PACKAGE / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```\n")[1::2]]
    commands = [[shlex.split(line, comments=True) for line in block.splitlines()] for block in blocks]
    return [[command[1:] for command in block if command[0] == "composer-rl"] for block in commands]


def test_the_readmes_commands_run_as_they_are(site, tmp_path):
    shutil.copy(PACKAGE / "session.txt", tmp_path)
    commands = documented()[0]
    assert [command[0] for command in commands] == ["plugins", "conformance", "ingest", "hints"]
    for command in commands:
        if command != ["conformance", "test_acme.py"]:  # the test above
            done = composer_rl(*command, site=site, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    hints = [json.loads(line).get("hint") for line in (tmp_path / "states.jsonl").read_text().splitlines()]
    assert [h["generator"] for h in hints if h] == ["acme_rules"]


def test_a_recipe_names_its_channel(site, tmp_path):
    pytest.importorskip("trl")
    checked = composer_rl("validate", PACKAGE / "recipe.yaml", site=site, cwd=tmp_path)
    assert "acme_drift" not in checked.stdout and "Unknown" not in checked.stdout, checked.stdout
    bad = (PACKAGE / "recipe.yaml").read_text().replace("margin: 0.05", "margins: 0.05")
    (tmp_path / "bad.yaml").write_text(bad)
    refused = composer_rl("validate", "bad.yaml", site=site, cwd=tmp_path)
    assert refused.returncode == 2 and "acme_drift" in refused.stdout, refused.stdout


def test_a_real_trainer_trains_with_its_channel(site, tmp_path):
    pytest.importorskip("trl")
    code = TRAIN.format(
        tests=str(PACKAGE.parents[1] / "tests/trl"), recipe=str(PACKAGE / "recipe.yaml"), out=str(tmp_path / "out")
    )
    done = python("-c", code, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(done.stdout.split("METRICS ")[1])
    # the second of two updates on the same rollouts: the policy has moved away from the one that sampled
    assert metrics["acme_drift/tokens"] > 0 and metrics["acme_drift/nats"] > 0 and metrics["acme_drift/loss"] > 0


@pytest.mark.slow
@pytest.mark.model
def test_the_readmes_training_run(site, tmp_path):
    """Two optimizer steps of SmolLM2 through the recipe, with the channel on (3 minutes on 2 cores)."""
    pytest.importorskip("trl")
    for name in ("composer_plugins", "examples"):
        (tmp_path / name).symlink_to(PACKAGE.parents[1] / name)
    for command in documented()[1]:
        done = composer_rl(*command, site=site, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (tmp_path / "runs/acme/metrics.jsonl").read_text().splitlines()]
    first, second = (record for record in metrics if "acme_drift/loss" in record)
    assert first["acme_drift/tokens"] == 0 < second["acme_drift/tokens"] and second["acme_drift/loss"] > 0
    summary = json.loads((tmp_path / "runs/acme/summary.json").read_text())
    assert "plugin acme-agent:acme" in summary["provenance"]["acme_drift"]
