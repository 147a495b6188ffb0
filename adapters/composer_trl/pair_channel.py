"""Channel 3 (our addition) on TRL: DPO on recorded pairs, beside the rollouts of every optimizer step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object
from rich.progress import track

from composer_plugins.channels.base import Term
from composer_plugins.channels.replay_dpo import replay_dpo_term
from composer_plugins.config import ReplayDPOConfig
from composer_plugins.errors import ConfigError
from composer_trl.pair_stream import PaddedPairs

if TYPE_CHECKING:
    from composer_trl.trainer import ComposerGRPOTrainer


class PairChannel:
    """Builds the replay_dpo term.

    Args:
        config: the `replay_dpo` section.
        trainer: whose model and tokenizer are used.
    """

    def __init__(self, config: ReplayDPOConfig, trainer: ComposerGRPOTrainer) -> None:
        self.config, self.trainer = config, trainer
        self.stream = PaddedPairs(
            config,
            trainer._tokenizer,
            seed=trainer.args.seed,
            chat_template=trainer.chat_template,
            **trainer.chat_template_kwargs,
        )
        self._micro = 0

    def begin(self) -> None:
        """Before the first step: score, under the initial weights, every pair that the run will draw."""
        state = self.trainer.state
        needed = self.stream.unscored(state.global_step, state.max_steps - state.global_step)
        if state.global_step > 0 and needed:
            raise ConfigError(  # the weights have moved: scoring now would not be the reference
                f"This resumed run would draw {len(needed)} pairs that the first run did not score under the initial "
                "weights (it was planned with fewer steps or fewer pairs per step). Resume with the first run's "
                "max_steps and pairs_per_step, or start a new run from the checkpoint's model."
            )
        if not needed:
            return
        accelerator, started = self.trainer.accelerator, time.perf_counter()
        mine = needed[accelerator.process_index :: accelerator.num_processes]
        progress = iter
        if accelerator.is_main_process:
            progress = lambda items: track(items, description="reference log-probs of the pairs")  # noqa: E731
        with accelerator.autocast():
            computed = self.stream.compute_reference(self.trainer.access, mine, accelerator.device, progress)
        if accelerator.num_processes > 1:
            computed = dict(gather_object(list(computed.items())))
        self.stream.reference.update(computed)
        self.trainer.monitor.note(
            f"{len(needed)} pairs scored under the initial weights", time.perf_counter() - started
        )

    def step_end(self) -> None:
        """Start counting micro-batches of the next optimizer step."""
        self._micro = 0

    def terms(self) -> list[Term]:
        """Return the term of this micro-batch, or nothing when none of the step's pairs falls to it."""
        trainer = self.trainer
        accelerator = trainer.accelerator
        slots = trainer.current_gradient_accumulation_steps * accelerator.num_processes
        slot = self._micro * accelerator.num_processes + accelerator.process_index
        self._micro += 1
        indices = self.stream.indices(trainer.state.global_step, slot=slot, slots=slots)
        if not indices:
            return []
        batch = self.stream.batch(indices, accelerator.device)
        with accelerator.autocast():
            logps, mask = self.stream.logprobs(trainer.access, batch)
        reference = self.stream.reference_logprobs(batch, mask)
        n = len(indices)
        term = replay_dpo_term(
            self.config,
            chosen_logprobs=logps[:n],
            chosen_mask=mask[:n],
            ref_chosen_logprobs=reference[:n],
            rejected_logprobs=logps[n:],
            rejected_mask=mask[n:],
            ref_rejected_logprobs=reference[n:],
            denominator=float(self.config.pairs_per_step),
            pair_weights=batch.weights,
        )
        trainer.monitor.pairs(term, n)
        return [term]

    def save(self, folder: Path) -> None:
        """Write the reference log-probabilities into a checkpoint folder."""
        self.stream.save(folder)

    def load(self, folder: Path) -> None:
        """Restore the reference log-probabilities from a checkpoint folder."""
        self.stream.load(folder)
