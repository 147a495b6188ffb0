"""The adapter of `docs/how-to/write-an-adapter.md`, taken from the page and run as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs/how-to/write-an-adapter.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's files, by the name in their first line."""
    folder = tmp_path_factory.mktemp("adapter")
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        name = re.match(r"# (\S+\.py)\n", block).group(1)
        (folder / name).write_text(block)
    return folder


def conformance(folder, *more):
    command = re.search(r"```\ncomposer-rl (conformance .*)\n```", PAGE.read_text()).group(1).split()
    return subprocess.run(
        [sys.executable, "-m", "composer_plugins.cli", *command[:2], "--report", "report.json", *more],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip


def test_the_pages_adapter_is_conformant(folder):
    done = conformance(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((folder / "report.json").read_text())
    assert report["counts"]["passed"] >= 40 and not report["counts"].get("failed")


def test_a_reduction_that_breaks_the_advantage_form_is_detected(folder):
    """A host that takes a per-sequence mean of the pair tokens no longer has DPO's gradient."""
    adapter = folder / "bare_host.py"
    text = adapter.read_text()
    old = "return replay_dpo_term(self.config.replay_dpo, denominator=count, **sides)"
    assert text.count(old) == 1
    mean = (
        "term = replay_dpo_term(self.config.replay_dpo, denominator=count, **sides)\n"
        "        lengths = [len(pair[s]) for s in ('chosen', 'rejected') for _ in range(len(pair[s]))]\n"
        "        from dataclasses import replace\n"
        "        return replace(term, values=term.values / torch.tensor(lengths))"
    )
    try:
        adapter.write_text(text.replace(old, mean))
        done = conformance(folder, "-k", "advantage_form")
    finally:
        adapter.write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((folder / "report.json").read_text())["results"]
    assert [r["outcome"] for r in results if r["contract"] == "test_advantage_form_equals_pairwise_dpo"] == ["failed"]
