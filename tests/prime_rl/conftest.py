"""prime-rl for the tests: a source tree named by the environment variable PRIME_RL, put on the path, never copied.

`make test-prime-rl PRIME_RL=/path/to/prime-rl` sets everything up. Tests that need it carry `@pytest.mark.prime_rl` and
are skipped, with the reason, where there is no tree; with COMPOSER_REQUIRE_PRIME_RL=1 its absence ends the run.
"""

import importlib
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # prime-rl compiles helpers that no test here calls

DATA = Path(__file__).parent / "data"


def tree() -> Path | None:
    """The source tree of prime-rl, or None."""
    path = os.environ.get("PRIME_RL")
    return Path(path).expanduser().absolute() if path else None


def on_path(root: Path) -> list[str]:
    return [str(root / "src"), *map(str, sorted(root.glob("packages/*/src")))]


def why_absent() -> str | None:
    """Why prime-rl cannot be imported here; None when it can."""
    root = tree()
    if root is None:
        return "no prime-rl here: make test-prime-rl PRIME_RL=/path/to/prime-rl (docs/how-to/prime-rl.md)"
    if not (root / "src" / "prime_rl" / "trainer" / "rl" / "loss.py").is_file():
        return f"PRIME_RL={root} is no prime-rl source tree: it has no src/prime_rl/trainer/rl/loss.py"
    if sys.version_info < (3, 12):
        return f"prime-rl needs Python 3.12, this is {sys.version.split()[0]}: make test-prime-rl PRIME_RL={root}"
    return None


ABSENT = why_absent()
if ABSENT is None:
    sys.path[:0] = [entry for entry in on_path(tree()) if entry not in sys.path]
elif os.environ.get("COMPOSER_REQUIRE_PRIME_RL"):
    raise pytest.UsageError(ABSENT)


def pytest_runtest_setup(item):
    if ABSENT is not None and item.get_closest_marker("prime_rl"):
        pytest.skip(ABSENT)


@pytest.fixture(scope="session")
def prime_tree():
    """Path of prime-rl's source tree."""
    if ABSENT is not None:
        pytest.skip(ABSENT)
    return tree()


@pytest.fixture(scope="session")
def prime_loss(prime_tree):
    """prime-rl's own `prime_rl.trainer.rl.loss`."""
    return importlib.import_module("prime_rl.trainer.rl.loss")


@pytest.fixture(scope="session")
def oracle():
    """The formulas in float64 NumPy, which share no code with the losses."""
    from composer_plugins.conformance import oracle

    return oracle


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_hook_is_left_behind():
    """The loss listens to optimizer steps; each test begins and ends without."""
    activity = sys.modules.get("composer_prime_rl.activity")
    yield
    activity = activity or sys.modules.get("composer_prime_rl.activity")
    if activity is not None:
        activity.stop()


def record_files() -> list[Path]:
    return sorted(DATA.glob("loss_inputs_*.json"))


def read_records(path: Path) -> dict:
    """A file of make_records.py."""
    return json.loads(path.read_text())


def record_inputs(record: dict, sample: dict):
    """A recorded `LossInputs` as an object with exactly the fields that this version of prime-rl has."""
    import torch

    values = {}
    for field in record["fields"]:
        entry = sample[field]
        values[field] = entry and torch.tensor(
            [float(x) for x in entry["values"]] if entry["dtype"] != "bool" else entry["values"],
            dtype=getattr(torch, entry["dtype"]),
        ).reshape(entry["shape"])
    return types.SimpleNamespace(**values)
