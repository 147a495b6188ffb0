"""Where the pair rows of a step go among its rollouts, so that verl never tears a pair apart.

verl cuts the batch of a step three times, always in order when `actor.shuffle` is false: into equal parts per
data-parallel rank (dispatch), each into equal mini-batches (`make_iterator`), each into micro-batches of groups of
`force_group_size` rows (`prepare_micro_batches`). A *slot* is one rank's part of one mini-batch. Every slot keeps its
rollouts and gets its share of the mini-batch's pairs behind them; filler rows make all slots equally long.
Pure bookkeeping: no torch, no verl.
"""

from __future__ import annotations

from dataclasses import dataclass

from composer_plugins.errors import ConfigError

GROUP = 2


@dataclass(frozen=True)
class Row:
    """A row of the update: rollout number `rollout` of the batch, or side 0/1 of a pair, or (neither) a filler."""

    rollout: int | None = None
    pair: int | None = None
    side: int = 0
    mini_batch: int = 0


FILLER = Row()
FILLER_TOKENS = 2


@dataclass(frozen=True)
class Layout:
    """The rows of an update in verl's order, and the rows of one slot."""

    rows: list[Row]
    slot_rows: int


def lay_out(
    lengths: list[int],
    pairs: list[list[int]],
    *,
    ranks: int,
    token_budget: int | None = None,
    groups_per_micro: int = 1,
) -> Layout:
    """Place pairs among the rollouts of a step.

    Args:
        lengths: tokens of each rollout row, in the order in which verl would train on them: rank by rank, each
            rank's mini-batches one after the other.
        pairs: per mini-batch, the pairs it trains on (any number each).
        ranks: data-parallel ranks.
        token_budget: with dynamic batch size, the tokens of a micro-batch: no group of two rows exceeds it. At least
            the longest rollout and a filler.
        groups_per_micro: without dynamic batch size, groups per micro-batch: a slot is a multiple of it.

    Returns:
        `Layout`, `ranks * len(pairs)` slots of equal length, rank by rank.

    Raises:
        ConfigError: the rollouts do not divide into the slots.
    """
    per_slot, left = divmod(len(lengths), ranks * len(pairs))
    if left:
        raise ConfigError(
            f"{len(lengths)} rollouts cannot be cut into {len(pairs)} mini-batches on {ranks} ranks: verl pads batches "
            "to a multiple of both; composer_verl is tested with verl 0.9.1."
        )
    slots: list[list[tuple[Row, Row]]] = []
    for rank in range(ranks):
        for number, drawn in enumerate(pairs):
            first = (rank * len(pairs) + number) * per_slot
            groups = _group_rollouts(range(first, first + per_slot), lengths, token_budget)
            for pair in drawn[rank::ranks]:
                groups.append((Row(pair=pair, side=0, mini_batch=number), Row(pair=pair, side=1, mini_batch=number)))
            slots.append(groups)
    longest = max(map(len, slots))
    size = -(-longest // groups_per_micro) * groups_per_micro
    rows = []
    for groups in slots:
        groups += [(FILLER, FILLER)] * (size - len(groups))
        rows += [row for group in groups for row in group]
    return Layout(rows, size * GROUP)


def _group_rollouts(numbers: range, lengths: list[int], budget: int | None) -> list[tuple[Row, Row]]:
    """Rollouts in twos, in their own order where the budget allows, else the longest with the shortest."""
    order = list(numbers)
    fits = budget is None or all(
        sum(lengths[i] for i in order[k : k + GROUP]) <= budget for k in range(0, len(order), GROUP)
    )
    if fits:
        rows = [Row(rollout=i) for i in order] + [FILLER] * (len(order) % GROUP)
        return list(zip(rows[::GROUP], rows[1::GROUP], strict=True))
    groups, left = [], sorted(order, key=lambda i: lengths[i])
    while left:
        longest = left.pop()
        partner = FILLER
        if left and lengths[left[0]] + lengths[longest] <= budget:
            partner = Row(rollout=left.pop(0))
        groups.append((Row(rollout=longest), partner))
    return groups
