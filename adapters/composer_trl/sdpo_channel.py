"""Channel 2 on TRL: KL of the student to its hint-reading self on the error turns of a micro-batch.

The student's side comes from hidden states captured on TRL's own forward, or at level `sampled` from the
log-probs that forward returned; only the hinted tokens are projected to the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from composer_plugins.channels.base import Term
from composer_plugins.channels.levels import SignalLevel
from composer_plugins.channels.sdpo import resolve_level, sdpo_importance_weight, sdpo_term, sdpo_values
from composer_plugins.config import SDPOConfig
from composer_trl.hinted_turns import HintedTurn
from composer_trl.model_access import in_chunks
from composer_trl.self_teacher import SelfTeacher

if TYPE_CHECKING:
    from composer_trl.trainer import ComposerGRPOTrainer


class SDPOChannel:
    """Builds the sdpo term.

    Args:
        config: the `sdpo` section.
        trainer: whose model, tokenizer and metrics are used.
        levels: the signal levels that TRL offers.
    """

    def __init__(self, config: SDPOConfig, trainer: ComposerGRPOTrainer, levels: tuple[SignalLevel, ...]) -> None:
        self.config, self.trainer = config, trainer
        self.level = resolve_level(config, levels)
        self.teacher = SelfTeacher(trainer.accelerator.unwrap_model(trainer.model), config.teacher)
        self.temperature = config.temperature or trainer.temperature

    def units(self, turns: list[list[HintedTurn]]) -> float:
        """Tokens of this micro-batch that have a self-teacher."""
        return float(sum(sum(turn.mask) for row in turns for turn in row))

    def terms(
        self,
        inputs: dict[str, Any],
        logps: torch.Tensor,
        hidden: torch.Tensor,
        turns: list[list[HintedTurn]],
        denominator: float,
    ) -> list[Term]:
        """Return the term of a micro-batch, or nothing when no turn of it has a hint (then no teacher forward).

        Args:
            inputs: TRL's batch. logps: (B, T), with gradient. hidden: (B, P+T, H), with gradient.
            turns: per row. denominator: hinted tokens of the whole optimizer step.
        """
        flat = [(row, turn) for row, row_turns in enumerate(turns) for turn in row_turns if any(turn.mask)]
        if not flat:
            return []
        device, ids = logps.device, inputs["completion_ids"]
        spans = [ids[row, turn.start : turn.end] for row, turn in flat]
        for span, (_, turn) in zip(spans, flat, strict=True):
            turn.token_ids = span.tolist()
        # only sampled tokens carry the KL: tool results inside a span are read, not scored
        sampled = torch.tensor([m for _, turn in flat for m in turn.mask], device=device)
        rows = torch.tensor([row for row, turn in flat for _ in turn.mask], device=device)[sampled]
        columns = torch.tensor([t for _, turn in flat for t in range(turn.start, turn.end)], device=device)[sampled]
        with self.trainer.accelerator.autocast():
            teacher, reference = self._teacher_hidden([turn for _, turn in flat], spans)
            token_ids = ids[rows, columns]
            if self.level is SignalLevel.SAMPLED and self.temperature == self.trainer.temperature:
                values, divergence = in_chunks(self._sampled, teacher[sampled], token_ids, logps[rows, columns])
            else:
                student = hidden[rows, inputs["prompt_ids"].size(1) - 1 + columns]
                values, divergence = in_chunks(self._values, student, teacher[sampled], reference[sampled], token_ids)
        weights = self._correction(inputs, logps, rows, columns)
        term = sdpo_term(
            self.config, values, denominator=denominator, divergence=divergence, importance_weights=weights
        )
        self.trainer.monitor.sdpo(term, flat, divergence, self)
        return [term]

    def _teacher_hidden(self, turns: list[HintedTurn], spans: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states under the teacher's weights, and under the reference for trust_region (else the same)."""
        pad = self.trainer._tokenizer.pad_token_id
        main = self.teacher.hidden(turns, spans, pad, weights=self.teacher.weights)
        if self.config.teacher.kind != "trust_region":
            return main, main
        return main, self.teacher.hidden(turns, spans, pad, weights=self.teacher.reference)

    def _sampled(self, teacher, token_ids, logprobs) -> tuple[torch.Tensor, torch.Tensor]:
        """The same at level `sampled`: the student's side is the log-probs that the policy forward gave."""
        with torch.no_grad():
            logits = self.teacher.access.logits(teacher, self.teacher.weights) / self.temperature
            teacher_logprobs = torch.log_softmax(logits, dim=-1).gather(-1, token_ids[:, None])[:, 0]
        return sdpo_values(self.config, self.level, logprobs=logprobs, teacher_logprobs=teacher_logprobs)

    def _values(self, student, teacher, reference, token_ids) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss values (N,) with gradient and divergences (N,) of a chunk of hinted tokens."""
        access, teacher_access = self.trainer.access, self.teacher.access
        student_logits = access.logits(student)
        with torch.no_grad():
            teacher_logits = teacher_access.logits(teacher, self.teacher.weights)
            reference_logits = None
            if self.config.teacher.kind == "trust_region":
                reference_logits = teacher_access.logits(reference, self.teacher.reference)
        return sdpo_values(
            self.config,
            self.level,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            ref_teacher_logits=reference_logits,
            token_ids=token_ids,
            temperature=self.temperature,
        )

    def _correction(self, inputs: dict[str, Any], logps, rows, columns) -> torch.Tensor | None:
        """Detached weights (N,): min(pi/pi_old, is_clip), times the host's engine correction; None on-policy."""
        old, engine = inputs.get("old_per_token_logps"), inputs.get("importance_sampling_ratio")
        weights = None
        if old is not None:
            weights = sdpo_importance_weight(self.config, logps[rows, columns], old[rows, columns])
        if engine is not None:
            engine = engine.expand_as(logps)[rows, columns]
            weights = engine if weights is None else weights * engine
        return weights

    def save(self, folder: Path) -> None:
        """Write the teacher into a checkpoint folder."""
        self.teacher.save(folder)

    def load(self, folder: Path) -> None:
        """Restore the teacher from a checkpoint folder."""
        self.teacher.load(folder)
