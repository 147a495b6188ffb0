"""verl's adapter under the suites that any adapter runs (`composer-rl conformance verl`), its own engine included."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_verl.conformance import TestVerl, TestVerlEngine

__all__ = ["TestVerl", "TestVerlEngine"]

CPU_HOST = str(Path(__file__).with_name("cpu_host"))


@pytest.fixture(scope="module", autouse=True)
def engine_for_a_cpu():
    """The processes that the suite starts find verl's engine for a CPU, and this one stays as it is."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VERL_PLATFORM", "cpu")
        patch.setenv("VERL_USE_EXTERNAL_MODULES", "composer_cpu_host")
        patch.setenv("PYTHONPATH", os.pathsep.join([CPU_HOST, os.environ.get("PYTHONPATH", "")]))
        patch.setattr(sys, "path", [CPU_HOST, *sys.path])
        yield
