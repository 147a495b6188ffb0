"""Channel 2 on verl's driver: error turns of a step, their hints, what the self-teacher says, and where it goes.

The rollouts themselves are the student's rows: the teacher's log-probabilities become one more field per response
token, so that the update has no additional rows. Token ids are never rendered again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from composer_plugins.channels.levels import SignalLevel
from composer_plugins.config import SDPOConfig, TeacherWeights
from composer_plugins.errors import UnsupportedError
from composer_verl.checks import level_of
from composer_verl.error_turns import Attempt, HintedTurn, HintSources
from composer_verl.fields import SDPO_MASK, SDPO_TEACHER, SDPO_TOKENS, SDPO_TOPK_IDS, SDPO_TOPK_TEACHER
from composer_verl.rollout_rows import FIELDS, RolloutRow, rows_of, unwrapped
from composer_verl.rollouts import reader_of
from composer_verl.teachers import Teacher, lora, ranks_of

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta

#: Columns of the dataset, or of a colocated reward function, that say something; see `said_about`.
TEXTS = ("hint", "error", "error_class", "feedback")


class HintedRows:
    """Adds what channel 2 reads to the rollouts of a step.

    Args:
        config: the `sdpo` section.
        trainer: verl's trainer after its `_setup`.

    Raises:
        ModelError, ConfigError: the chat template or the hint generator's options do not do.
        UnsupportedError: a model that reads images.
    """

    def __init__(self, config: SDPOConfig, trainer) -> None:
        self.config, self.trainer = config, trainer
        if getattr(trainer.processor, "image_processor", None) is not None:
            raise UnsupportedError(
                "composer.sdpo on verl makes hinted contexts of text only, and this model reads images; set sdpo.weight: 0."
            )
        self.level = level_of(trainer.config, config)
        self.teacher = Teacher(config.teacher, trainer)
        self.student = Teacher(TeacherWeights(kind="live"), trainer)
        self.sources = HintSources(
            config, trainer.tokenizer, reader_of(trainer), max_tokens=longest_row(trainer.config, config.teacher.kind),
            template_kwargs=dict(trainer.config.data.get("apply_chat_template_kwargs", None) or {}),
        )  # fmt: skip
        self._seconds = 0.0

    def add(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Put the fields of channel 2 into TransferQueue and return the batch with them.

        Args:
            batch: the rollouts in the order in which verl trains on them, with old log-probs and, if the run has it,
                rollout correction already in TransferQueue.
        """
        import transfer_queue as tq

        begin = time.perf_counter()
        self.sources.counts.clear()
        fields = [*FIELDS, *TEXTS]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        attempts = attempts_of(rows_of(batch, data), data)
        real = [i for i, attempt in enumerate(attempts) if not attempt.row.tag.get("is_padding", False)]
        turns = self.sources.turns([attempts[i] for i in real])
        for turn in turns:
            turn.attempt = real[turn.attempt]
        rows = [attempt.row for attempt in attempts]
        own = self._fields(rows, turns)
        done = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=own)
        done.extra_info = batch.extra_info
        self._seconds = time.perf_counter() - begin
        return done

    def _fields(self, rows: list[RolloutRow], turns: list[HintedTurn]):
        """Have the teacher read, and return channel 2's fields."""
        self.teacher.begin()
        self.student.begin()
        spans = [rows[turn.attempt].response_ids[turn.start : turn.end] for turn in turns]
        hinted = [(turn.prefix_ids, span) for turn, span in zip(turns, spans, strict=True)]
        lengths, mini_batches = [len(row.response_ids) for row in rows], self._mini_batches(len(rows))
        if self.level is SignalLevel.SAMPLED:
            return sdpo_fields(lengths, turns, self.teacher.log_probs(hinted), mini_batches)
        asked = None
        if self.config.top_k_of == "student":
            before = [[*rows[t.attempt].prompt_ids, *rows[t.attempt].response_ids[: t.start]] for t in turns]
            asked, _ = self.student.entries(list(zip(before, spans, strict=True)), self.config.top_k)
        ids, values = self.teacher.entries(hinted, self.config.top_k, asked)
        fields = sdpo_fields(lengths, turns, [torch.zeros(len(span)) for span in spans], mini_batches)
        return add_entries(fields, lengths, turns, ids if asked is None else asked, values, self.config.top_k)

    def _mini_batches(self, rows: int) -> list[int]:
        config = self.trainer.config.actor_rollout_ref
        size = config.actor.ppo_mini_batch_size * config.rollout.n
        return mini_batch_of(rows, ranks_of(self.trainer.actor_rollout_wg, "actor"), size)

    def metrics(self) -> dict[str, float]:
        """What happened in the last step, as far as the driver knows it."""
        counts = self.sources.counts
        names = ("error_turns", "unhinted", "hinted_turns", "too_long", "unplaced", "rejected")
        return {
            **{f"sdpo/{name}": float(counts[name]) for name in names},
            "sdpo/teacher_seconds": self._seconds,
            "sdpo/teacher_rows": float(self.teacher.rows + self.student.rows),
            "sdpo/teacher_tokens": float(self.teacher.tokens + self.student.tokens),
            "sdpo/teacher_peak_gb": max(self.teacher.peak_gb, self.student.peak_gb),
        }

    def why_silent(self) -> str:
        """Say why no token had a self-teacher in the last step, or why the hints moved nothing."""
        counts, found = self.sources.counts, []
        if counts["hinted_turns"]:
            return f"{counts['hinted_turns']} turns had a hint, but it did not change the teacher (zero divergence)"
        if counts["too_long"]:
            found.append(
                f"{counts['too_long']} hinted contexts are longer than {self.sources.max_tokens} tokens (the model's "
                "positions, or log_prob_max_token_len_per_gpu)"
            )
        if counts["unplaced"]:
            found.append(f"{counts['unplaced']} hints could not be placed: {self.sources.unplaced_why}")
        if counts["unhinted"]:
            found.append(f"the hint generator had nothing to say about {counts['unhinted']} error turns")
        if counts["rejected"]:
            found.append(f"rollout correction rejected all tokens of {counts['rejected']} hinted turns")
        if not found:
            found = [LOOKED_FOR[source] for source in self.config.hint.sources]
        return "no turn of the rollouts had a hint (" + "; ".join(found) + ")"


#: What each hint source found nothing of.
LOOKED_FOR = {
    "recorded": "no `hint` in the dataset's rows or their extra_info",
    "rollout": "no tool result that classifies as a failure",
    "feedback": "no `feedback` or `hint` in what the reward function returned, nor in the agent loop's extra_fields",
    "sibling": "no group with both a success and a failure",
}


def attempts_of(rows: list[RolloutRow], data: Any) -> list[Attempt]:
    """Return the rollouts with the texts that came with them and the tokens that rollout correction keeps."""
    kept = [part.tolist() for part in data["response_mask"].unbind()] if "response_mask" in data.keys() else None  # noqa: SIM118
    columns = {name: list(data[name]) for name in TEXTS if name in data.keys()}  # noqa: SIM118
    found = []
    for i, row in enumerate(rows):
        own = {name: unwrapped(values[i]) for name, values in columns.items()}
        found.append(Attempt(row, said_about(row, own), None if kept is None else [bool(m) for m in kept[i]]))
    return found


def said_about(row: RolloutRow, columns: dict[str, Any]) -> dict[str, str]:
    """Return the texts that came with a rollout.

    `hint`, `error`, `error_class`: columns of the dataset, or keys of its `extra_info` (a state recorded just before
    a step that failed). `feedback`, `advice`: `feedback` and `hint` of what the reward function returned, or of the
    agent loop's `extra_fields`; a colocated reward function's come as columns.
    """
    recorded = {**(row.columns.get("extra_info") or {}), **{k: v for k, v in columns.items() if k != "feedback"}}
    reward = row.extra.get("reward_extra_info") or {}
    found = {name: recorded.get(name) for name in ("hint", "error", "error_class")}
    found["feedback"] = reward.get("feedback") or row.extra.get("feedback") or columns.get("feedback")
    found["advice"] = reward.get("hint") or row.extra.get("hint")
    return {name: str(text) for name, text in found.items() if isinstance(text, str) and text.strip()}


def sdpo_fields(lengths: list[int], turns: list[HintedTurn], log_probs: list[torch.Tensor], mini_batch: list[int]):
    """Return the TensorDict of channel 2's fields (see `composer_verl.fields`), a row per rollout.

    Args:
        lengths: response tokens of each rollout.
        turns: hinted turns; where two spans of a rollout overlap (`scope: completion`), the later turn's teacher
            takes over.
        log_probs: (span tokens,) of each turn, nats.
        mini_batch: of each rollout; the denominator counts the tokens of all rows of one.
    """
    from tensordict import TensorDict

    masks = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    teacher = [torch.zeros(n, dtype=torch.float32) for n in lengths]
    for turn, values in sorted(zip(turns, log_probs, strict=True), key=lambda pair: pair[0].start):
        masks[turn.attempt][turn.start : turn.end] = torch.tensor(turn.mask, dtype=torch.int64)
        teacher[turn.attempt][turn.start : turn.end] = values
    counts = torch.zeros(max(mini_batch) + 1)
    for mask, number in zip(masks, mini_batch, strict=True):
        counts[number] += mask.sum()
    return TensorDict(
        {
            SDPO_MASK: torch.nested.as_nested_tensor(masks, layout=torch.jagged),
            SDPO_TEACHER: torch.nested.as_nested_tensor(teacher, layout=torch.jagged),
            SDPO_TOKENS: counts[torch.tensor(mini_batch)],
        },
        batch_size=len(lengths),
    )


def add_entries(
    fields, lengths: list[int], turns: list[HintedTurn], ids: list[torch.Tensor], values: list[torch.Tensor], k: int
):
    """Return `fields` with those of level topk: (response tokens, k) per row, zeros outside the hinted turns.

    Args:
        fields: from `sdpo_fields`. lengths, turns: as there.
        ids, values: (span tokens, k') of each turn; k' is below k when the vocabulary is.
    """
    width = ids[0].size(-1) if ids else k
    entries = [torch.zeros(n, width, dtype=torch.int32) for n in lengths]
    teacher = [torch.zeros(n, width) for n in lengths]
    for turn, own, said in sorted(zip(turns, ids, values, strict=True), key=lambda part: part[0].start):
        entries[turn.attempt][turn.start : turn.end] = own.int()
        teacher[turn.attempt][turn.start : turn.end] = said
    fields[SDPO_TOPK_IDS] = torch.nested.as_nested_tensor(entries, layout=torch.jagged)
    fields[SDPO_TOPK_TEACHER] = torch.nested.as_nested_tensor(teacher, layout=torch.jagged)
    return fields


def mini_batch_of(rows: int, ranks: int, size: int) -> list[int]:
    """Return the mini-batch of each row: verl gives ranks contiguous parts, and cuts each into equal parts in order.

    Args:
        rows: of the step, a multiple of `size`. ranks: data-parallel. size: rows of a mini-batch over all ranks.

    >>> mini_batch_of(8, 2, 4)
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    per_rank, own = rows // ranks, size // ranks
    return [row % per_rank // own for row in range(rows)]


def longest_row(config, kind: str) -> int:
    """Return how many tokens a hinted row may have: the model's positions, and verl's limit with dynamic batch size."""
    from verl.utils.config import omega_conf_to_dataclass

    model, part = omega_conf_to_dataclass(config.actor_rollout_ref.model), config.actor_rollout_ref
    text = getattr(model.hf_config, "text_config", None) or model.hf_config
    limits = [getattr(text, "max_position_embeddings", None) or 2**31]
    forward = part.ref if kind == "reference" and not lora(config) else part.rollout
    if forward.log_prob_use_dynamic_bsz:
        parallel = max(
            part.actor.get("ulysses_sequence_parallel_size", 1) or 1,
            (part.actor.get("fsdp_config", None) or {}).get("ulysses_sequence_parallel_size", 1) or 1,
        )
        limits.append(forward.log_prob_max_token_len_per_gpu * parallel)
    return min(limits)
