"""Defects planted in the verl adapter, caught by the contract that names them on verl's real training worker."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own (docs/how-to/verl.md)", allow_module_level=True
    )

from composer_plugins.conformance.mutants import Mutant as AnyMutant
from composer_plugins.conformance.mutants import copy_packages, outcomes, plant

pytestmark = pytest.mark.slow  # about 20 seconds each; `make test-verl-slow`

ROOT = Path(__file__).parents[2]
VERL = "composer_verl"
Mutant = partial(AnyMutant, suite=f"{VERL}/conformance.py::TestVerlEngine")
CPU = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "composer_cpu_host"}

MUTANTS = [
    Mutant(
        "the average moves by a decay", f"{VERL}/ema_engine.py", "average.lerp_(local.to(average), rate)",
        "average.lerp_(local.to(average), 1 - rate)", "test_the_ema_teacher_follows_at_its_rate",
    ),
    Mutant(
        "the average is not in the checkpoint", f"{VERL}/ema_engine.py", "            self._average[name].copy_(tensor)",
        "            pass", "test_a_resumed_run_takes_the_same_next_step",
    ),
    Mutant(
        "the live weights read for the average", f"{VERL}/teachers.py", 'if self.kind == "ema":', 'if self.kind == "none":',
        "test_the_ema_teacher_follows_at_its_rate",
    ),
    Mutant(
        "the hinted turn is off by one", f"{VERL}/hinted_rows.py",
        "masks[turn.attempt][turn.start : turn.end] = torch.tensor(turn.mask, dtype=torch.int64)",
        "masks[turn.attempt][turn.start - 1 : turn.end - 1] = torch.tensor(turn.mask, dtype=torch.int64)",
        "test_hint_gradient_stays_inside_the_error_turn[sampled]",
    ),
    Mutant(
        "a silent channel stays silent", f"{VERL}/monitor.py", "if getattr(self.section, channel).weight > 0:",
        "if getattr(self.section, channel).weight > 9:", "test_a_silent_channel_is_reported",
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_defect_is_caught_by_the_contract_that_names_it(mutant, tmp_path):
    copy_packages([ROOT / "composer_plugins", ROOT / "adapters" / VERL], tmp_path)
    plant(mutant, tmp_path)
    host = str(Path(__file__).with_name("cpu_host"))
    found = outcomes(tmp_path, mutant.suite, mutant.caught_by, environment=CPU, path=[host])
    assert found[mutant.caught_by] == "failed", found
