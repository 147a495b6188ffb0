"""What a pair row holds: its tokens, its own fields, and a neutral value for every field that rollouts have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from composer_plugins.channels.pair_stream import TokenizedPair
from composer_plugins.errors import UnsupportedError
from composer_verl.pair_layout import Row
from composer_verl.pair_loss import FILLER, PAIR_REFERENCE, PAIR_ROW, PAIR_WEIGHT, ROLLOUT

#: Per row, when the rollout temperature is not 1: verl's engines take one per row in place of the batch's.
TEMPERATURE = "temperature"


@dataclass(frozen=True)
class Side:
    """One action of a pair after its context, with the reference's log-probs and its number in the step."""

    context: list[int]
    action: list[int]
    reference: list[float]
    weight: float
    number: int


def side(pair: TokenizedPair, reference: tuple[list[float], list[float]], which: int, position: int) -> Side:
    """Return the chosen (0) or rejected (1) side of the pair that is `position`-th in the step."""
    action = (pair.chosen, pair.rejected)[which]
    return Side(pair.context, action, reference[which], pair.weight, 2 * position + which)


class RowMaker:
    """Makes pair rows that carry the same fields as the rollouts of a batch.

    Args:
        first: a rollout of the batch, every field (a TensorDict row or a mapping).
        eos: token id that filler rows consist of.
        temperature: of the rollouts, when it has to be given per row; None: one for the batch.

    Raises:
        UnsupportedError: the rollouts are multi-modal (their position ids have several axes).
    """

    def __init__(self, first: Mapping[str, Any], eos: int, temperature: float | None) -> None:
        self.eos, self.temperature = eos, temperature
        fields = {name: first[name] for name in first.keys()}  # noqa: SIM118  a TensorDict iterates over rows
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        response, sequence = len(tensors["responses"]), len(tensors["input_ids"])
        if tensors["position_ids"].dim() != 1:
            raise UnsupportedError(
                "composer.replay_dpo: this model's position ids have several axes (multi-modal); channel 3 on verl "
                "makes text rows only. Set replay_dpo.weight: 0."
            )
        self.per_response = {n: t for n, t in tensors.items() if t.dim() and len(t) == response}
        self.per_token = {n: t for n, t in tensors.items() if t.dim() and len(t) == sequence}
        self.per_row = {n: t for n, t in tensors.items() if not t.dim()}

    def sample(self, row: Side | None) -> dict[str, torch.Tensor]:
        """Return the fields of a pair's side; None: of a filler row."""
        context, action = (row.context, row.action) if row else ([self.eos], [self.eos])
        ids = torch.tensor([*context, *action])
        fields = {name: torch.zeros_like(value) for name, value in self.per_row.items()}
        for length, group in ((len(action), self.per_response), (len(ids), self.per_token)):
            fields |= {name: value.new_zeros((length, *value.shape[1:])) for name, value in group.items()}
        fields |= text_fields(context, action)
        if "attention_mask" in self.per_token:
            fields["attention_mask"] = torch.ones_like(ids)
        fields[PAIR_ROW] = torch.tensor(row.number if row else FILLER)
        fields[PAIR_REFERENCE] = torch.tensor(row.reference if row else [0.0])
        fields[PAIR_WEIGHT] = torch.tensor(row.weight if row else 0.0)
        if self.temperature is not None:
            fields[TEMPERATURE] = torch.tensor(1.0)
        return fields


def text_fields(context: list[int], action: list[int]) -> dict[str, torch.Tensor]:
    """The fields that verl's engine reads, with masks of zero: no count of verl's sees the row."""
    ids = torch.tensor([*context, *action])
    return {
        "prompts": ids[: len(context)],
        "responses": ids[len(context) :],
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "response_mask": torch.zeros(len(action), dtype=torch.long),
        "loss_mask": torch.zeros(len(action), dtype=torch.long),
    }


def rollout_fields(response_lengths: list[int], temperature: float | None):
    """Return the pair fields of the rollouts themselves, as a TensorDict: no pair, no reference, no weight."""
    from tensordict import TensorDict

    count = len(response_lengths)
    fields = {
        PAIR_ROW: torch.full((count,), ROLLOUT),
        PAIR_REFERENCE: jagged([torch.zeros(length) for length in response_lengths]),
        PAIR_WEIGHT: torch.zeros(count),
    }
    if temperature is not None:
        fields[TEMPERATURE] = torch.full((count,), float(temperature))
    return TensorDict(fields, batch_size=count)


def stacked(samples: list[dict[str, torch.Tensor]]):
    """Return rows as one TensorDict: values per row dense, the others jagged."""
    from tensordict import TensorDict

    fields = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        fields[name] = jagged(values) if values[0].dim() else torch.stack(values)
    return TensorDict(fields, batch_size=len(samples))


def jagged(values: list[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths as verl keeps them."""
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


def step_sides(
    rows: list[Row], pairs: list[TokenizedPair], reference: Mapping[int, tuple[list[float], list[float]]]
) -> list[Side | None]:
    """Return the synthetic rows of a layout in its order; fillers are None."""
    sides, position = [], -1
    for row in rows:
        if row.rollout is not None:
            continue
        if row.pair is None:
            sides.append(None)
            continue
        position += row.side == 0
        sides.append(side(pairs[row.pair], reference[row.pair], row.side, position))
    return sides
