"""Defects planted in the shipped source, one at a time: the contract that names the defect must fail.

Each mutant is one replacement in one file of a copy of the packages; the suite then runs on that copy in a process of
its own. A replacement that no longer matches the source fails the test, so the list cannot rot.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("trl")

pytestmark = pytest.mark.slow  # two to four minutes; `make test-mutants`, which the gate runs too

ROOT = Path(__file__).parents[2]
CORE, TRL, TORCHFT = "composer_plugins", "composer_trl", "composer_torchft"
SUITES = {TRL: f"{TRL}/conformance.py::TestTRL", TORCHFT: f"{TORCHFT}/conformance.py::TestTorchFT"}


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; the contract `caught_by` of the package `of` has to fail."""

    name: str
    file: str
    old: str
    new: str
    caught_by: str
    of: str = TRL


MUTANTS = [
    Mutant(
        "the sign of the surrogate", f"{CORE}/losses/policy.py", "plain, held = -ratio * advantages, -bounded * advantages",
        "plain, held = ratio * advantages, bounded * advantages", "test_policy_value_and_gradient[grpo]",
    ),
    Mutant(
        "the mask is off by one", f"{TRL}/policy_channel.py",
        'return mask * batch["tool_mask"] if "tool_mask" in batch else mask',
        'return mask * batch["tool_mask"].roll(1, -1) if "tool_mask" in batch else mask',
        "test_policy_value_and_gradient[dapo]",
    ),
    Mutant(
        "the padded width as dr_grpo's denominator", f"{CORE}/losses/reduction.py",
        "return sequences * length_constant", "return sequences * mask.size(1)", "test_policy_value_and_gradient[dr_grpo]",
    ),
    Mutant(
        "cispo's weight is not detached", f"{CORE}/losses/policy.py", "values = -bounded.detach() * advantages * logprobs",
        "values = -bounded * advantages * logprobs", "test_policy_value_and_gradient[cispo]",
    ),
    Mutant(
        "gspo's ratio goes through the token", f"{CORE}/losses/policy.py",
        "log_ratio = logprobs - logprobs.detach() + mean", "log_ratio = logprobs - old_logprobs",
        "test_policy_value_and_gradient[gspo]",
    ),
    Mutant(
        "the loss of a micro-batch is divided by its own count", f"{TRL}/trainer.py",
        "total = counts[first : first + window].sum(0)", "total = counts[i] * window", "test_micro_batches_change_nothing[dapo]",
    ),
    Mutant(
        "a rank-local mean", f"{TRL}/trainer.py", 'counts = self.accelerator.reduce(counts, reduction="sum")',
        "counts = counts * self.accelerator.num_processes", "test_two_ranks_change_nothing",
    ),
    Mutant(
        "masked only afterwards", f"{CORE}/losses/policy.py",
        "    logprobs = safe(logprobs, mask)\n    old_logprobs = safe(old_logprobs.detach(), mask)",
        "    old_logprobs = old_logprobs.detach()", "test_garbage_under_the_mask_reaches_nothing[nan]",
    ),
    Mutant(
        "the KL runs the other way", f"{CORE}/losses/divergence.py", "elif alpha == 1.0:", "elif alpha == 2.0:",
        "test_direction_of_the_divergence[1.0]",
    ),
    Mutant(
        "the hint leaks into the mask", f"{TRL}/sdpo_channel.py",
        "for t in range(turn.start, turn.end)], device=device)[sampled]",
        "for t in range(turn.start - 1, turn.end - 1)], device=device)[sampled]",
        "test_hint_gradient_stays_inside_the_error_turn[full]",
    ),
    Mutant(
        "all rows in sdpo's denominator", f"{TRL}/sdpo_channel.py",
        "return float(sum(sum(turn.mask) for row in turns for turn in row))", "return float(len(turns) * 8)",
        "test_sdpo_value_and_gradient[full]",
    ),
    Mutant(
        "sdpo forgets the temperature", f"{TRL}/sdpo_channel.py",
        "self.temperature = config.temperature or trainer.temperature", "self.temperature = config.temperature or 1.0",
        "test_sdpo_at_a_temperature[full]",
    ),
    Mutant(
        "the student's tokens are read again without the hint", f"{TRL}/self_teacher.py",
        "input_ids[row, start:context] = torch.tensor(turn.prefix_ids, device=device)",
        "input_ids[row, start:context] = torch.tensor(turn.prefix_ids, device=device).masked_fill("
        "torch.tensor(turn.prefix_ids) == 1, 2)",
        "test_the_teacher_reads_the_same_ids_after_the_hint",
    ),
    Mutant(
        "a stale reference: the reference teacher is the live policy", f"{TRL}/self_teacher.py",
        'return self.reference if self.config.kind == "reference" else None', "return None",
        "test_the_reference_teacher_stands_still",
    ),
    Mutant(
        "an update rate taken for a decay", f"{TRL}/self_teacher.py",
        "self.ema[name].lerp_(parameter.detach().float(), self.config.ema_rate)",
        "self.ema[name].lerp_(parameter.detach().float(), 1 - self.config.ema_rate)",
        "test_the_ema_teacher_follows_at_its_rate",
    ),
    Mutant(
        "a resumed teacher starts anew", f"{TRL}/self_teacher.py", "            self.ema[name].copy_(tensor)", "            pass",
        "test_a_resumed_run_takes_the_same_next_step",
    ),
    Mutant(
        "chosen and rejected count alike", f"{CORE}/losses/dpo.py", "masked(beta * (chosen - rejected)",
        "masked(beta * (chosen + rejected)", "test_replay_dpo_value_and_gradient[False]",
    ),
    Mutant(
        "pairs at the rollout temperature", f"{TRL}/pair_stream.py",
        "flat = access.token_logprobs(hidden[:, :-1][mask], batch.input_ids[:, 1:][mask])",
        "flat = access.token_logprobs(hidden[:, :-1][mask], batch.input_ids[:, 1:][mask], temperature=0.7)",
        "test_replay_dpo_value_and_gradient[False]",
    ),
    Mutant(
        "the advantage form divides by each action's length", f"{CORE}/losses/dpo.py",
        "up = (s / chosen_length if length_normalized else s)", "up = s / chosen_length",
        "test_advantage_form_equals_pairwise_dpo",
    ),
    Mutant(
        "weight 0 is computed all the same", f"{TRL}/trainer.py", "        if self.composer.sdpo.weight > 0:\n",
        "        if self.composer.sdpo.weight >= 0:\n", "test_weight_zero_costs_no_forward",
    ),
    Mutant(
        "a silent channel stays silent", f"{CORE}/channels/silence.py", "        if active > 0:\n",
        "        if active >= 0:\n", "test_a_silent_channel_is_reported",
    ),
    Mutant(
        "the outer gradient has the other sign", f"{TORCHFT}/exchange.py", "lr=config.lr, momentum", "lr=config.lr, maximize=True, momentum",
        "test_two_islands_follow_the_prediction", TORCHFT,
    ),
    Mutant(
        "an outer step without Nesterov", f"{TORCHFT}/exchange.py", "nesterov=config.nesterov", "nesterov=False",
        "test_two_islands_follow_the_prediction", TORCHFT,
    ),
    Mutant(
        "the all-reduce is a no-op", f"{TORCHFT}/exchange.py", "    def _clear_local_parameters(self) -> None:",
        "    def _average_grads(self):\n"
        "        self._allreduce_work = [self._manager.allreduce(g.clone()) for g in self._grads.values()]\n\n"
        "    def _clear_local_parameters(self) -> None:",
        "test_islands_are_equal_after_every_sync", TORCHFT,
    ),
    Mutant(
        "half of the outer gradient", f"{TORCHFT}/exchange.py", "lr=config.lr, momentum", "lr=config.lr / 2, momentum",
        "test_it_equals_float64_on_the_recorded_parameters[heavy ball]", TORCHFT,
    ),
    Mutant(
        "unequal initial weights pass", f"{TORCHFT}/handshake.py", "    if len({c.values for c in newest}) > 1:\n", "    if False:\n",
        "test_unequal_initial_parameters_are_refused", TORCHFT,
    ),
    Mutant(
        "outer momentum is not in the checkpoint", f"{TORCHFT}/exchange.py",
        '        self._outer_optimizer.load_state_dict(state["outer_optimizer"])\n', "",
        "test_a_resumed_run_keeps_its_momentum", TORCHFT,
    ),
    Mutant(
        "an island's own steps get into the model", f"{TORCHFT}/loop.py",
        "            fragment.cancel()\n            fragment.restore_parameters()\n", "            fragment.cancel()\n",
        "test_what_is_exported_is_the_global_model", TORCHFT,
    ),
]  # fmt: skip


def source_of(file: str) -> Path:
    folder = ROOT if file.startswith(CORE) else ROOT / "adapters"
    return folder / file


def conformance(folder: Path, contract: str, of: str = TRL) -> dict[str, str]:
    """Run one contract on the packages in `folder`; return outcome by test name."""
    report = folder / "report.json"
    (folder / "pytest.ini").write_text("[pytest]\n")
    name = contract.split("[")[0]
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder),
            "-p", "composer_plugins.conformance.plugin", "-p", "no:cacheprovider", "--import-mode=importlib",
            "--conformance-json", str(report), f"{folder / SUITES[of]}::{name}",
        ],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        cwd=folder, capture_output=True, text=True, timeout=300,  # `-m` puts the working directory first
    )  # fmt: skip
    assert report.exists(), done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    return {r["contract"] + (f"[{r['parameters']}]" if r["parameters"] else ""): r["outcome"] for r in results}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_defect_is_caught_by_the_contract_that_names_it(mutant, tmp_path):
    if mutant.of == TORCHFT and importlib.util.find_spec("torchft") is None:
        pytest.skip("torchft is not installed: make test-torchft sets it up")
    for package in (ROOT / CORE, ROOT / "adapters" / mutant.of):
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    patched = tmp_path / mutant.file
    text = source_of(mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} no longer has exactly one {mutant.old!r}: rewrite the mutant"
    patched.write_text(text.replace(mutant.old, mutant.new))
    outcomes = conformance(tmp_path, mutant.caught_by, mutant.of)
    assert outcomes[mutant.caught_by] == "failed", outcomes


def test_the_unchanged_source_passes_the_same_way(tmp_path):
    for package in (ROOT / CORE, ROOT / "adapters" / TRL):
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    assert set(conformance(tmp_path, "test_channels_add").values()) == {"passed"}
