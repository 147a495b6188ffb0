"""Runs prime-rl's own tests for loss, algorithms, advantages and packing, without us and then with us.

    python tests/prime_rl/own_suite.py /path/to/prime-rl

"With us" means in one process with our loss imported and our algorithm registered. The exit code is 1 when a test that
passes without us does not pass with us, or when nothing passed at all.

prime-rl's `tests/conftest.py` is left out (`--noconftest`): it ends processes of this machine by name. What the tests
need of it (its logger, a clean environment) is in the plugin part of this file. Its loss tests ask for
"cuda"; on a machine without a GPU they get the CPU, and nothing is compiled.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

FILES = (
    "tests/unit/train/rl/test_loss.py",
    "tests/unit/orchestrator/test_algorithms.py",
    "tests/unit/orchestrator/test_advantage.py",
    "tests/unit/orchestrator/test_batch.py",
)


def main() -> int:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / FILES[0]).is_file():
        print(f"usage: {Path(__file__).name} /path/to/prime-rl (a source tree with {FILES[0]})", file=sys.stderr)
        return 2
    tree = Path(sys.argv[1]).absolute()
    without, with_us = outcomes(tree, ours=False), outcomes(tree, ours=True)
    for name, found in (("prime-rl alone", without), ("with composer_prime_rl", with_us)):
        counts = Counter(found.values())
        print(f"{name}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())))
    for test, outcome in sorted(without.items()):
        if outcome == "failed":
            print(f"fails without us: {test}")
    worse = [t for t, outcome in without.items() if outcome == "passed" and with_us.get(t) != "passed"]
    for test in worse:
        print(f"FAILS WITH US: {test} ({with_us.get(test, 'not run')})")
    return 1 if worse or "passed" not in without.values() else 0


def outcomes(tree: Path, *, ours: bool) -> dict[str, str]:
    """Outcome by test of one pytest process in the tree, which is left as it was."""
    files = [name for name in FILES if (tree / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "outcomes.json"
        path = [str(Path(__file__).parent), str(tree / "src"), *map(str, sorted(tree.glob("packages/*/src")))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OWN_SUITE_REPORT": str(report),
            "OWN_SUITE_OURS": "1" if ours else "",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--noconftest",
            "-p",
            "own_suite",
            "-p",
            "no:cacheprovider",
            "-q",
            *files,
        ]
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if not report.exists():
            print(result.stdout[-3000:], result.stderr[-3000:], file=sys.stderr)
            return {}
        return json.loads(report.read_text())


# The plugin part: pytest loads this file by `-p own_suite`.

if __name__ != "__main__":
    import pytest

    _outcomes: dict[str, str] = {}

    def on_cpu(torch):
        """A mode in which `x.cuda()` is x and `device="cuda"` is the CPU."""

        class OnCPU(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                kwargs = dict(kwargs or {})
                if func is torch.Tensor.cuda:
                    return args[0]
                if str(kwargs.get("device")).startswith("cuda"):
                    kwargs["device"] = "cpu"
                return func(*args, **kwargs)

        return OnCPU()

    def pytest_configure(config):
        import torch

        if not torch.cuda.is_available():
            on_cpu(torch).__enter__()
        if os.environ.get("OWN_SUITE_OURS"):
            import composer_prime_rl.loss  # noqa: F401  as prime-rl's trainer does
            from composer_prime_rl.algorithm import register, register_runtime

            try:
                register()
                register_runtime()
            except (ImportError, AttributeError) as error:  # before 0.7 there are no algorithms to add one to
                print(f"the algorithm `composer` is not registered: {error}")

    def pytest_runtest_logreport(report):
        if report.when == "call" or report.outcome != "passed":
            _outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(report):
        if report.failed:
            _outcomes[report.nodeid] = "not collected"

    def pytest_sessionfinish(session):
        Path(os.environ["OWN_SUITE_REPORT"]).write_text(json.dumps(_outcomes))

    @pytest.fixture(autouse=True)
    def prime_rl_logger():
        from prime_rl.utils.logger import reset_logger, setup_logger

        setup_logger("debug")
        yield
        reset_logger()

    @pytest.fixture(autouse=True)
    def clean_environment():
        before = dict(os.environ)
        yield
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
