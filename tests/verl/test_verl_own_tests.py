"""verl's own CPU tests, shipped inside its wheel: the same ones pass with our plugin loaded and without any plugin.

python -m pytest tests/verl/test_verl_own_tests.py                # losses, aggregation, advantages, config, batches
python -m pytest -m slow tests/verl/test_verl_own_tests.py        # every `*_on_cpu.py` of verl
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

#: What our package could change: losses, aggregation, advantages, metrics, configuration, and the batches they see.
OURS_TOO = ("tests/trainer/", "tests/test_base_config", "tests/test_protocol")
#: Every test of verl 0.9.1 in these files; a smaller number would mean that they were not collected.
COUNT = 202
PROBE = """
import json, os, sys
FOUND = {}

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        FOUND[report.nodeid] = report.outcome

def pytest_sessionfinish():
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    ours = sorted(name for name in sys.modules if name.startswith("composer_"))
    modes = sorted(name for name in POLICY_LOSS_REGISTRY if name.startswith("composer_"))
    with open(os.environ["PROBE_OUT"], "w") as file:
        json.dump({"tests": FOUND, "modules": ours, "loss_modes": modes}, file)
"""


def unpack(folder: Path) -> list[str]:
    """Copy verl's test tree into `folder` (other wheels put theirs in the same place); return its `*_on_cpu.py`."""
    found = []
    for file in importlib.metadata.files("verl") or ():
        if file.parts[0] == "tests" and file.suffix == ".py":
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(file.locate()).read_bytes())
            if file.name.endswith("_on_cpu.py"):
                found.append(str(file))
    return sorted(found)


def outcomes(folder: Path, files: list[str], plugins: str, timeout: int = 300) -> dict:
    """Run verl's test files in a process of their own; return what the probe saw."""
    (folder / "verl_probe.py").write_text(PROBE)
    out = folder / f"{plugins}.json"
    environment = {
        **os.environ, "VERL_USE_EXTERNAL_PLUGINS": plugins, "PROBE_OUT": str(out), "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    environment.pop("VERL_USE_EXTERNAL_MODULES", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "verl_probe", "-p", "no:cacheprovider", "-c", os.devnull]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), *files],
        capture_output=True, text=True, timeout=timeout, cwd=folder, env=environment,
    )  # fmt: skip
    assert out.exists(), done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    found["report"] = done.stdout[-4000:]
    return found


def test_losses_aggregation_and_config_with_our_plugin_and_without(tmp_path):
    files = [name for name in unpack(tmp_path) if name.startswith(OURS_TOO)]
    ours, none = outcomes(tmp_path, files, "auto"), outcomes(tmp_path, files, "none")
    assert "composer_dr_grpo" in ours["loss_modes"] and "composer_verl.register" in ours["modules"]
    assert none["modules"] == [] and none["loss_modes"] == []
    assert set(ours["tests"].values()) == {"passed"}, ours["report"]
    assert ours["tests"] == none["tests"], none["report"]
    assert len(ours["tests"]) == COUNT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_cpu_test_of_verl_ends_as_without_our_plugin(tmp_path):
    """Some need servers or models that are not here and fail on stock verl too: no test may change sides."""
    files = unpack(tmp_path)
    ours, none = outcomes(tmp_path, files, "auto", timeout=700), outcomes(tmp_path, files, "none", timeout=700)
    assert ours["loss_modes"] and none["modules"] == []
    changed = {name: (none["tests"].get(name), x) for name, x in ours["tests"].items() if none["tests"].get(name) != x}
    assert changed == {} and len(ours["tests"]) == len(none["tests"]) > COUNT
    counts = {kind: list(ours["tests"].values()).count(kind) for kind in ("passed", "skipped", "failed")}
    print(counts)
    assert counts["passed"] > COUNT
