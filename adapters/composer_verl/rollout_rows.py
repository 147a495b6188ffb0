"""The rollouts of a step as verl keeps them in TransferQueue: one row per output of a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from composer_plugins.traces.model_fields import number_or_none

#: What a row of TransferQueue has that the export wants. verl passes over those that a run does not have.
FIELDS = [
    "uid", "prompts", "responses", "response_mask", "loss_mask", "rm_scores", "advantages", "raw_prompt", "extra_fields",
    "reward_model", "extra_info", "data_source", "agent_name", "index",
]  # fmt: skip

#: Texts of a reward function's result that are feedback: `{"score": 0.0, "feedback": "two tests fail: ..."}`.
FEEDBACK_KEY = "feedback"


@dataclass
class RolloutRow:
    """One row of a step: what verl put into TransferQueue for one output of one session.

    Args:
        key: `{uid}_{session}_{output}`.
        tag: verl's tag of the row (padding, weight versions).
        prompt_ids, response_ids, mask: token ids, and 1 where the model sampled.
        reward: sum of the row's scores, None when it was not scored.
        prompt: the messages that the agent loop started from.
        extra: verl's `extra_fields`: `reward_extra_info`, `turn_scores`, `tool_rewards`, what the agent loop adds.
        columns: further fields of the row (dataset columns).
    """

    key: str
    tag: dict[str, Any]
    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    reward: float | None
    prompt: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    advantage: float | None = None

    @property
    def name(self) -> tuple[str, int, int]:
        """(uid, session, output): the order in which rollouts are written."""
        parts = self.key.rsplit("_", 2)
        if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
            return parts[0], int(parts[1]), int(parts[2])
        return self.key, 0, 0

    @property
    def feedback(self) -> str | None:
        """What the reward function said in words, if it did."""
        said = (self.extra.get("reward_extra_info") or {}).get(FEEDBACK_KEY)
        return str(said) if isinstance(said, str) and said.strip() else None


def rows_of(batch: Any, data: Any) -> list[RolloutRow]:
    """Return the rows of a batch from the TensorDict that TransferQueue gives for it.

    Args:
        batch: `KVBatchMeta`; its keys and tags go with the rows of `data`.
        data: with `FIELDS`, as far as the run has them.
    """
    column = _columns(data, len(batch.keys))
    rows = []
    for i, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
        # verl's rollout correction takes rejected tokens out of response_mask; loss_mask stays as it was sampled
        mask = [int(m) for m in column("loss_mask" if "loss_mask" in data.keys() else "response_mask", i)]  # noqa: SIM118
        scores = column("rm_scores", i)
        rows.append(
            RolloutRow(
                key=key, tag=dict(tag), prompt_ids=column("prompts", i), response_ids=column("responses", i),
                mask=mask, reward=None if scores is None else number_or_none(float(sum(scores))),
                prompt=[dict(message) for message in column("raw_prompt", i) or []],
                extra=dict(column("extra_fields", i) or {}),
                columns={
                    name: column(name, i) for name in ("reward_model", "extra_info", "data_source", "agent_name", "index")
                },
                advantage=_uniform(column("advantages", i), mask),
            )
        )  # fmt: skip
    return rows


def unwrapped(value: Any) -> Any:
    """Return what a row of a column that is no tensor holds; a NumPy string as a string.

    TransferQueue gives such values bare or as `NonTensorData`. NumPy's have an attribute `data` too: their memory.
    """
    if isinstance(value, str):
        return str(value)
    return value if isinstance(value, np.generic | np.ndarray) else getattr(value, "data", value)


def _columns(data: Any, size: int) -> Callable[[str, int], Any]:
    """Return a getter (field, row) → list of numbers for tensors, the object itself for the others, None if absent."""
    import torch

    cache: dict[str, list[Any]] = {}

    def get(name: str, row: int) -> Any:
        if name not in cache:
            values = data[name] if name in data.keys() else [None] * size  # noqa: SIM118  a TensorDict has no `in`
            if isinstance(values, torch.Tensor):
                parts = values.unbind() if values.is_nested else values
                cache[name] = [part.tolist() for part in parts]
            else:
                cache[name] = [unwrapped(value) for value in values]
        return cache[name][row]

    return get


def _uniform(advantages: list[float] | None, mask: list[int]) -> float | None:
    """The advantage of a rollout when all its sampled tokens share it, as group-relative estimators assign it."""
    found = {a for a, m in zip(advantages or [], mask, strict=False) if m}
    return number_or_none(found.pop()) if len(found) == 1 else None
