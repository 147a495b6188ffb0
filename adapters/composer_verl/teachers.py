"""Who reads the hint on verl: the live weights, their moving average, or verl's reference worker.

Every kind is one more forward of verl's own workers, on a batch of hinted contexts:

| kind | whose weights | what it costs beside the forward |
|---|---|---|
| live | the actor's | nothing |
| ema | a moving average on the actor's ranks (`ema_engine`) | 4 bytes per trained parameter / ranks |
| reference | verl's reference worker, else (LoRA) the actor without its adapter | the initial weights in host memory |

`trust_region` mixes two distributions over the vocabulary, which verl's workers do not give.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from composer_plugins.config import TeacherWeights
from composer_plugins.errors import ConfigError, UnsupportedError
from composer_verl.fields import EMA_TEACHER, TEACHER, TOPK, TOPK_ASKED, TOPK_ID, TOPK_VALUE

logger = logging.getLogger("composer_verl")

#: Token ids (what is read before the span, the span).
Reading = tuple[list[int], list[int]]


class Teacher:
    """Scores spans under what is read before them. Carries no gradient.

    Args:
        config: the `sdpo.teacher` section.
        trainer: verl's trainer, whose worker groups do the work.
    """

    def __init__(self, config: TeacherWeights, trainer) -> None:
        self.kind, self.trainer = config.kind, trainer
        #: Since `begin`: rows and tokens read, filler included, and GB allocated at most on a rank.
        self.rows, self.tokens, self.peak_gb = 0, 0, 0.0

    def log_probs(self, readings: list[Reading]) -> list[torch.Tensor]:
        """Return the log-probabilities (len(span),) of each span's tokens, nats, at the rollout temperature."""
        return [values["log_probs"].float() for values in self._score(readings, {}, None)]

    def entries(
        self, readings: list[Reading], k: int, asked: list[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return, for each span, the ids (len(span), k) of vocabulary entries and their log-probabilities.

        Args:
            readings: as `log_probs`.
            k: entries per token; fewer when the vocabulary is smaller.
            asked: (len(span), k) ids per span whose log-probabilities are wanted; None: the k most likely ones.
        """
        flags = {TOPK: k, "compute_loss": True, "distillation_use_topk": True}
        ids, values = [], []
        for found in self._score(readings, flags, asked):
            count = sum(name.startswith(TOPK_VALUE.format("")) for name in found)
            for name, rows in ((TOPK_ID, ids), (TOPK_VALUE, values)):
                rows.append(torch.stack([found[name.format(i)] for i in range(count)], dim=-1))
        return ids, values

    def _score(
        self, readings: list[Reading], flags: dict[str, Any], asked: list[torch.Tensor] | None
    ) -> list[dict[str, torch.Tensor]]:
        """Return what the workers say about each span's tokens, by name of their output."""
        from verl.utils import tensordict_utils as tu

        if not readings:
            return []
        group, mesh = self._group()
        dynamic, micro = self._micro_batches()
        order, micro = deal([len(a) + len(b) for a, b in readings], ranks_of(group, mesh), dynamic, micro)
        filler = ([self.trainer.tokenizer.eos_token_id], [self.trainer.tokenizer.eos_token_id])
        rows = [filler if number is None else readings[number] for number in order]
        batch = hinted_batch(rows, temperature=float(self.trainer.config.actor_rollout_ref.rollout.temperature))
        if asked is not None:
            spare = asked[0].new_zeros(1, asked[0].size(-1))
            parts = [spare if number is None else asked[number] for number in order]
            batch[TOPK_ASKED] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        self._address(batch, dynamic, micro)
        tu.assign_non_tensor(batch, **flags)
        output = group.compute_ref_log_prob(batch) if mesh == "ref" else group.compute_log_prob(batch)
        self.rows += len(rows)
        self.tokens += sum(len(a) + len(b) for a, b in rows)
        self.peak_gb = max(self.peak_gb, _peak(output))
        named = {k: v.unbind() for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_nested}
        found: list[dict[str, torch.Tensor]] = [{} for _ in readings]
        for place, number in enumerate(order):
            if number is not None:
                size = len(rows[place][1])
                # position t says something about token t + 1
                found[number] = {name: tensors[place][-size - 1 : -1] for name, tensors in named.items()}
        return found

    def begin(self) -> None:
        """Forget what the last step cost."""
        self.rows, self.tokens, self.peak_gb = 0, 0, 0.0

    def _group(self) -> tuple[Any, str]:
        """Return (worker group, name of its mesh)."""
        if self.kind == "reference" and not self.trainer.ref_in_actor:
            return self.trainer.ref_policy_wg, "ref"
        return self.trainer.actor_rollout_wg, "actor"

    def _micro_batches(self) -> tuple[bool, int | None]:
        """Return (dynamic batch size, rows per micro-batch otherwise) of that group's forwards."""
        part = self.trainer.config.actor_rollout_ref["ref" if self._group()[1] == "ref" else "rollout"]
        return bool(part.log_prob_use_dynamic_bsz), part.log_prob_micro_batch_size_per_gpu

    def _address(self, batch, dynamic: bool, micro: int | None) -> None:
        """Write into the batch what verl's worker and our engine read from it."""
        from verl.utils import tensordict_utils as tu

        if not dynamic:
            tu.assign_non_tensor(batch, micro_batch_size_per_gpu=micro)
        if self.kind == "ema":
            tu.assign_non_tensor(batch, **{TEACHER: EMA_TEACHER})
        if self.kind == "reference" and self.trainer.ref_in_actor:
            tu.assign_non_tensor(batch, no_lora_adapter=True)


def hinted_batch(rows: list[Reading], *, temperature: float):
    """Return the TensorDict that verl's workers take for a forward over rows of (before, span) token ids."""
    from verl.utils import tensordict_utils as tu

    def nested(parts: list[list[int]]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(p, dtype=torch.int64) for p in parts], layout=torch.jagged)

    whole = [[*before, *span] for before, span in rows]
    ones = [[1] * len(span) for _, span in rows]
    return tu.get_tensordict(
        {
            "prompts": nested([before for before, _ in rows]),
            "responses": nested([span for _, span in rows]),
            "input_ids": nested(whole),
            "position_ids": nested([list(range(len(row))) for row in whole]),
            "response_mask": nested(ones),
            "loss_mask": nested(ones),
        },
        non_tensor_dict={"temperature": temperature, "calculate_entropy": False, "compute_loss": False},
    )


def deal(lengths: list[int], ranks: int, dynamic: bool, micro: int | None) -> tuple[list[int | None], int | None]:
    """Return (row numbers in verl's order, rows per micro-batch); None in the order is a filler row.

    verl gives each rank an equal, contiguous part. Rows go to the ranks by length, there and back, so that every rank
    gets about as many tokens; inside a rank they lie by length, so that micro-batches pad little.

    >>> deal([5, 9, 3], 2, True, None)
    ([1, None, 0, 2], None)
    """
    per_rank = -(-len(lengths) // ranks)
    if not dynamic:
        micro = max(1, min(micro or 1, per_rank))
        per_rank = -(-per_rank // micro) * micro
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    parts: list[list[int | None]] = [[] for _ in range(ranks)]
    for place, number in enumerate(by_length):
        turn, rank = divmod(place, ranks)
        parts[rank if turn % 2 == 0 else ranks - 1 - rank].append(number)
    for part in parts:
        part += [None] * (per_rank - len(part))
    return [number for part in parts for number in part], micro


def ranks_of(group, mesh: str) -> int:
    """Return the data-parallel ranks of one mesh of a worker group."""
    if mesh not in group._dispatch_info:
        group._dispatch_info[mesh] = group._query_dispatch_info(mesh)
    return max(group._dispatch_info[mesh]) + 1


def _peak(output) -> float:
    """GB allocated at most on a rank, as verl's worker reports it; 0 where it does not."""
    from verl.utils import tensordict_utils as tu

    metrics = tu.get(output, "metrics", default=None)
    value = metrics.get("perf/max_memory_allocated_gb", 0.0) if isinstance(metrics, dict) else 0.0
    return float(value or 0.0)


def check_teacher(kind: str, config) -> None:
    """Raise when verl cannot give this kind of teacher under a configuration.

    Args:
        kind: `sdpo.teacher.kind`.
        config: verl's whole configuration.

    Raises:
        UnsupportedError: `ema` on another engine than FSDP2, or `trust_region`.
        ConfigError: `reference` without what the reference worker needs.
    """
    actor, ref = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref
    if kind == "trust_region":
        raise UnsupportedError(
            "sdpo.teacher.kind: trust_region mixes two distributions over the whole vocabulary, which verl's workers do "
            "not give; use ema, reference or live."
        )
    if kind == "ema" and actor.strategy not in ("fsdp2", "composer_fsdp2"):
        raise UnsupportedError(
            f"sdpo.teacher.kind: ema keeps the average inside verl's FSDP2 engine, found actor.strategy: "
            f"{actor.strategy}; set actor_rollout_ref.actor.strategy: fsdp2, or sdpo.teacher.kind: reference or live."
        )
    if kind != "reference" or lora(config):
        return
    if not ref.log_prob_use_dynamic_bsz and ref.log_prob_micro_batch_size_per_gpu is None:
        raise ConfigError(
            "sdpo.teacher.kind: reference runs verl's reference worker, which needs its micro-batch size: set "
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu (or log_prob_use_dynamic_bsz: true)."
        )


def lora(config) -> bool:
    """True when verl takes the reference from the actor, without its adapter (verl's own rule)."""
    model = config.actor_rollout_ref.model
    rank = (model.get("lora", None) or {}).get("rank", 0) or 0
    return rank > 0 or (model.get("lora_rank", 0) or 0) > 0 or model.get("lora_adapter_path", None) is not None
