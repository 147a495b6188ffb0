"""Defects planted in the shipped source, one at a time: the contract that names the defect must fail.

How: `composer_plugins.conformance.mutants`. Those of the verl adapter are in `tests/verl/test_verl_mutants.py`.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl")

from composer_plugins.conformance.mutants import Mutant as AnyMutant
from composer_plugins.conformance.mutants import copy_packages, outcomes, plant
from composer_plugins.errors import ConfigError

pytestmark = pytest.mark.slow  # minutes; `make test-mutants`, which the gate runs too

ROOT = Path(__file__).parents[2]
CORE, TRL, TORCHFT = "composer_plugins", "composer_trl", "composer_torchft"
SUITES = {TRL: f"{TRL}/conformance.py::TestTRL", TORCHFT: f"{TORCHFT}/conformance.py::TestTorchFT"}
Mutant = partial(AnyMutant, suite=SUITES[TRL])
Outer = partial(AnyMutant, suite=SUITES[TORCHFT])


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
    Outer(
        "the outer gradient has the other sign", f"{TORCHFT}/exchange.py", "lr=config.lr, momentum", "lr=config.lr, maximize=True, momentum",
        "test_two_islands_follow_the_prediction",
    ),
    Outer(
        "an outer step without Nesterov", f"{TORCHFT}/exchange.py", "nesterov=config.nesterov", "nesterov=False",
        "test_two_islands_follow_the_prediction",
    ),
    Outer(
        "the all-reduce is a no-op", f"{TORCHFT}/exchange.py", "    def _clear_local_parameters(self) -> None:",
        "    def _average_grads(self):\n"
        "        self._allreduce_work = [self._manager.allreduce(g.clone()) for g in self._grads.values()]\n\n"
        "    def _clear_local_parameters(self) -> None:",
        "test_islands_are_equal_after_every_sync",
    ),
    Outer(
        "half of the outer gradient", f"{TORCHFT}/exchange.py", "lr=config.lr, momentum", "lr=config.lr / 2, momentum",
        "test_it_equals_float64_on_the_recorded_parameters[heavy ball]",
    ),
    Outer(
        "unequal initial weights pass", f"{TORCHFT}/handshake.py", "    if len({c.values for c in newest}) > 1:\n", "    if False:\n",
        "test_unequal_initial_parameters_are_refused",
    ),
    Outer(
        "outer momentum is not in the checkpoint", f"{TORCHFT}/exchange.py",
        '        self._outer_optimizer.load_state_dict(state["outer_optimizer"])\n', "",
        "test_a_resumed_run_keeps_its_momentum",
    ),
    Outer(
        "an island's own steps get into the model", f"{TORCHFT}/loop.py",
        "        lost = self._local_step\n        for fragment in self.fragments:\n            fragment.cancel()\n"
        "            fragment.restore_parameters()\n",
        "        lost = self._local_step\n        for fragment in self.fragments:\n            fragment.cancel()\n",
        "test_what_is_exported_is_the_global_model",
    ),
]  # fmt: skip


def packages(suite: str) -> list[Path]:
    return [ROOT / CORE, ROOT / "adapters" / suite.split("/")[0]]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_planted_defect_is_caught_by_the_contract_that_names_it(mutant, tmp_path):
    if mutant.suite == SUITES[TORCHFT] and importlib.util.find_spec("torchft") is None:
        pytest.skip("torchft is not installed: make test-torchft sets it up")
    copy_packages(packages(mutant.suite), tmp_path)
    plant(mutant, tmp_path)
    found = outcomes(tmp_path, mutant.suite, mutant.caught_by)
    assert found[mutant.caught_by] == "failed", found


def test_the_unchanged_source_passes_the_same_way(tmp_path):
    copy_packages(packages(SUITES[TRL]), tmp_path)
    assert set(outcomes(tmp_path, SUITES[TRL], "test_channels_add").values()) == {"passed"}


def test_a_mutant_that_no_longer_matches_is_an_error(tmp_path):
    copy_packages(packages(SUITES[TRL])[1:], tmp_path)
    with pytest.raises(ConfigError, match="0 times and not exactly once: rewrite the mutant 'old news'"):
        plant(Mutant("old news", f"{TRL}/trainer.py", "no such line", "x", "test_channels_add"), tmp_path)
