"""Run TRL's own GRPO tests on stock `GRPOTrainer` and on `ComposerGRPOTrainer`, without a model hub.

    python benchmarks/trl_host_suite.py --trl-src PATH [--which stock|composer|both] [-k EXPR]

PATH is a checkout of TRL whose `tests/` folder is used (docs/how-to/run-trl-tests.md). Each side is one
pytest process on a temporary copy of the tests; models and datasets are the local stand-ins of
tests/trl/standins.py. Besides the outcomes, what every `train()` call left behind is compared: a SHA-256
over all parameters and one over the logged metrics without timings. Exit code 1 when our side fails
anywhere that stock does not, or differs in any other way.

This file is also the pytest plugin that those processes load (the functions after "The plugin").
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOST_SECTION = '{"policy": {"objective": "host"}}'
NEEDED = ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py", "test_grpo_trainer.py")
INI = "[pytest]\nmarkers =\n    slow: slow\n    low_priority: low priority\n    invariant: invariant\n"
#: Log entries that measure time, which no two runs share.
TIMINGS = ("runtime", "per_second", "step_time", "profiling/", "_time")


# The runner


def main(argv: list[str] | None = None) -> int:
    """Run the sides asked for, print the table, return the exit code."""
    arguments = _parser().parse_args(argv)
    source = arguments.trl_src / "tests"
    if not (source / "test_grpo_trainer.py").is_file():
        print(
            f"No tests/test_grpo_trainer.py under {arguments.trl_src}: give a checkout of TRL.",
            file=sys.stderr,
        )
        return 2
    sides = ("stock", "composer") if arguments.which == "both" else (arguments.which,)
    with tempfile.TemporaryDirectory(prefix="trl-suite-") as folder:
        hub = arguments.hub or Path(folder) / "hub"
        print("Building the stand-in models ...", flush=True)
        _standins().build_hub(hub)
        results = {side: run_side(side, source, Path(folder) / side, hub, arguments) for side in sides}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1, sort_keys=True))
    print(table(results))
    if any(result["crashed"] for result in results.values()):
        return 1
    return verdict(results) if arguments.which == "both" else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trl-src", type=Path, required=True, help="a checkout of TRL (its tests/ folder is copied)")
    parser.add_argument("--which", choices=["stock", "composer", "both"], default="both")
    parser.add_argument("-k", default="", help="pytest's -k expression")
    parser.add_argument("--section", default=HOST_SECTION, help="our `composer` section as JSON")
    parser.add_argument("--timeout", type=int, default=300, help="seconds per test")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--hub", type=Path, help="keep the stand-in models here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write every outcome here")
    parser.add_argument("--verbose", action="store_true", help="show pytest's own output")
    return parser


def _standins():
    """Import tests/trl/standins.py, which is no package."""
    if str(ROOT / "tests" / "trl") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests" / "trl"))
    import standins

    return standins


def run_side(side: str, source: Path, folder: Path, hub: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run pytest for one side in its own process and folder; return outcomes, fingerprints and seconds."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    for name in NEEDED:
        if (source / name).exists():
            shutil.copy(source / name, tests / name)
    module = tests / "test_grpo_trainer.py"
    module.write_text(_standins().move_ids(module.read_text()))
    (folder / "pytest.ini").write_text(INI)
    report = folder / "report.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-p", "trl_host_suite", "-p", "no:cacheprovider", "-p", "no:xdist",
        "tests/test_grpo_trainer.py", "-q", "--no-header", f"--timeout={arguments.timeout}", "-W", "ignore",
        f"--suite-side={side}", f"--suite-section={arguments.section}", f"--suite-report={report}",
        f"--suite-threads={arguments.threads}", f"--basetemp={folder / 'tmp'}", "-k", arguments.k,
    ]  # fmt: skip
    path = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "trl"), str(ROOT), str(ROOT / "adapters")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
        # wide logits of tiny models: without these, a good part of the time goes into page faults
        "MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**28),
    }  # fmt: skip
    print(f"Running TRL's tests: {side} ...", flush=True)
    start = time.monotonic()
    with (folder / "pytest.log").open("w") as log:
        output = None if arguments.verbose else log
        code = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output).returncode
    seconds = time.monotonic() - start
    rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    crashed = code not in (0, 1, 5)  # 1: some test failed, 5: nothing selected
    if crashed:
        print(f"pytest ended with code {code}:\n{(folder / 'pytest.log').read_text()[-3000:]}", file=sys.stderr)
    return {"seconds": seconds, "tests": {row.pop("id"): row for row in rows}, "crashed": crashed}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the counts of each side, the reasons of skips and failures, as text."""
    columns = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    lines = [f"{'side':10}" + "".join(f"{c:>9}" for c in columns) + f"{'seconds':>9}"]
    for side, result in results.items():
        counts = Counter(test["outcome"] for test in result["tests"].values())
        lines.append(f"{side:10}" + "".join(f"{counts[c]:9d}" for c in columns) + f"{result['seconds']:9.0f}")
    for side, result in results.items():
        reasons = Counter(t["reason"] for t in result["tests"].values() if t["outcome"] == "skipped")
        if reasons:
            lines.append(f"\n{side}: skipped because")
        lines += [f"  {count:4d}  {reason}" for reason, count in reasons.most_common()]
        bad = {i: t for i, t in result["tests"].items() if t["outcome"] in ("failed", "error")}
        if bad and (side == "stock" or len(results) == 1):  # the comparison below names ours
            lines.append(f"{side}: failed")
            lines += [f"        {i}: {t['reason']}" for i, t in bad.items()]
    return "\n".join(lines)


def verdict(results: dict[str, dict[str, Any]]) -> int:
    """Compare both sides, print what differs; 0 when nothing does, else 1."""
    stock, ours = results["stock"]["tests"], results["composer"]["tests"]
    bad = ("failed", "error")
    worse = [i for i, t in ours.items() if t["outcome"] in bad and stock.get(i, {}).get("outcome") not in bad]
    other = [i for i in stock.keys() | ours.keys() if stock.get(i, {}).get("outcome") != ours.get(i, {}).get("outcome")]
    runs = same = 0
    different = {}
    for test in sorted(stock.keys() & ours.keys()):
        left, right = stock[test]["runs"], ours[test]["runs"]
        runs += max(len(left), len(right))
        same += sum(a == b for a, b in zip(left, right, strict=False))
        if left != right:
            pairs = list(zip(left, right, strict=False))
            kinds = [kind for i, kind in enumerate(("parameters", "metrics")) if any(a[i] != b[i] for a, b in pairs)]
            different[test] = ", ".join(kinds) or "number of trainings"
    print(f"\nFail with ours but not with stock: {len(worse)}")
    print("\n".join(f"  {i}: {ours[i]['reason']}" for i in sorted(worse)), end="\n" if worse else "")
    print(f"Any other difference of outcome: {len(set(other) - set(worse))}")
    print("".join(f"  {i}\n" for i in sorted(set(other) - set(worse))), end="")
    print(f"Trainings with bitwise equal parameters and equal logged metrics: {same} of {runs}")
    print("".join(f"  {i}: other {what}\n" for i, what in different.items()), end="")
    if not runs:
        print("No training ran on both sides: nothing was compared.")
    return 1 if worse or other or different or not runs else 0


# The plugin: loaded by the pytest processes above with `-p trl_host_suite`


class _Recorder:
    """Outcomes and fingerprints of one process, written a line per test."""

    def __init__(self, path: Path) -> None:
        self.path, self.runs, self.rows = path, [], {}

    def add(self, report) -> None:
        row = self.rows.setdefault(report.nodeid, {"outcome": "passed", "reason": "", "seconds": 0.0, "runs": []})
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.failed:
            row.update(outcome="failed" if report.when == "call" else "error", reason=_last_line(report))
        elif report.skipped and hasattr(report, "wasxfail"):
            row.update(outcome="xfailed", reason=report.wasxfail)
        elif report.skipped:
            row.update(outcome="skipped", reason=report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call" and hasattr(report, "wasxfail"):
            row.update(outcome="xpassed", reason=report.wasxfail)
        if report.when == "call":
            row["runs"] = self.runs
        if report.when == "teardown":
            with self.path.open("a") as file:
                file.write(json.dumps({"id": report.nodeid, **row}) + "\n")


def _last_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]


def pytest_addoption(parser) -> None:
    group = parser.getgroup("trl host suite")
    for name in ("side", "section", "report", "threads"):
        group.addoption(f"--suite-{name}")


def pytest_configure(config) -> None:
    import datasets
    import standins
    import torch
    import trl

    torch.set_num_threads(int(config.getoption("--suite-threads")))
    datasets.load_dataset = standins.load_dataset
    config.suite_recorder = _Recorder(Path(config.getoption("--suite-report")))
    config.pluginmanager.register(_Hooks(config.suite_recorder))
    _record_trainings(config.suite_recorder)
    _fill_in_availability(Path("tests/testing_utils.py"))
    if config.getoption("--suite-side") == "composer":
        trl.GRPOConfig, trl.GRPOTrainer = our_classes(json.loads(config.getoption("--suite-section")))


def _fill_in_availability(path: Path) -> None:
    """Define `is_X_available` helpers that a checkout's tests import and the installed TRL no longer has."""
    from trl import import_utils

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trl.import_utils":
            for name in (alias.name for alias in node.names if not hasattr(import_utils, alias.name)):
                found = find_spec(name.removeprefix("is_").removesuffix("_available")) is not None
                setattr(import_utils, name, lambda found=found: found)


class _Hooks:
    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def pytest_runtest_setup(self, item) -> None:
        """Same random numbers on both sides: some tests build adapters before the trainer sets its seed."""
        from transformers import set_seed

        self.recorder.runs = []
        set_seed(0)

    def pytest_runtest_logreport(self, report) -> None:
        self.recorder.add(report)


def our_classes(section: dict[str, Any]) -> tuple[type, type]:
    """Return our config and trainer, with `section` wherever a config comes without a `composer` section."""
    from composer_trl import ComposerGRPOConfig, ComposerGRPOTrainer

    post_init = ComposerGRPOConfig.__post_init__

    def with_section(self) -> None:
        self.composer = section if self.composer is None else self.composer
        post_init(self)

    ComposerGRPOConfig.__post_init__ = with_section  # no subclass: checkpoints pickle the config by its name
    return ComposerGRPOConfig, ComposerGRPOTrainer


def _record_trainings(recorder: _Recorder) -> None:
    """Wrap `Trainer.train`, which both sides end in, to fingerprint what it leaves behind."""
    from functools import wraps

    from transformers import Trainer

    train = Trainer.train

    @wraps(train)
    def recorded(self, *args, **kwargs):
        result = train(self, *args, **kwargs)
        recorder.runs.append([fingerprint(self.model), metrics(self.state.log_history)])
        return result

    Trainer.train = recorded


def fingerprint(model) -> str:
    """SHA-256 over the names, types and bytes of all parameters and buffers, in order."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def metrics(history: list[dict[str, Any]]) -> str:
    """The logged numbers as text, without timings (text: NaN equals NaN, and every digit counts)."""
    kept = [{k: v for k, v in entry.items() if not any(t in k for t in TIMINGS)} for entry in history]
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=repr).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
