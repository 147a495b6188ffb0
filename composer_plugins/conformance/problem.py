"""Neutral batches: a language model that is a table, rows sampled from it, hinted turns and pairs.

The logits after token id `i` are row `i` of a (V, V) table, and where a hint was read before, row `i` of a second
table is added. Every position of a problem has a token id of its own, so the logits of every position are free numbers
that no other position shares: the gradient of the table shows which token got which gradient, on any host, through
whatever forward pass the host makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from composer_plugins.conformance.oracle import row_logprobs

PAD, HINT, FIRST_ID = 0, 1, 2


@dataclass(frozen=True)
class Turn:
    """An error turn of a row: tokens `start` to `end` of the completion; the teacher reads a hint before it."""

    start: int
    end: int
    hint: tuple[int, ...] = (HINT,)


@dataclass(frozen=True)
class Row:
    """One rollout. `sampled` is False on tokens that a tool wrote. All of `completion`'s length but the prompt."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sampled: tuple[bool, ...]
    old_logprobs: np.ndarray
    advantage: float
    turns: tuple[Turn, ...] = ()

    @property
    def previous(self) -> tuple[int, ...]:
        """The token before each token of the completion."""
        return (self.prompt[-1], *self.completion[:-1])

    def hinted_context(self, turn: Turn) -> tuple[int, ...]:
        """What the teacher reads before the turn: the hint goes before the last token (the generation prompt)."""
        before = (*self.prompt, *self.completion[: turn.start])
        return (*before[:-1], *turn.hint, before[-1])


@dataclass(frozen=True)
class PairOfRows:
    """One preference pair with the log-probs of both actions under the reference, nats, temperature 1."""

    context: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class Problem:
    """A whole optimizer step.

    Args:
        table: (V, V) float64 logits after each token id; what is trained.
        hinted: (V, V) added to them where a hint was read before; never receives gradient.
        rows: rollouts. pairs: preference pairs. temperature: of the rollouts (pairs are scored at 1).
        group_size: rows of one prompt, adjacent.
        model: name of a language model whose token ids the rows hold, instead of the tables (which are then empty).
        vocabulary: number of token ids.
    """

    table: np.ndarray
    hinted: np.ndarray
    rows: tuple[Row, ...]
    pairs: tuple[PairOfRows, ...] = ()
    temperature: float = 1.0
    group_size: int = 2
    model: str | None = None
    vocabulary: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", self.vocabulary or len(self.table))

    @property
    def width(self) -> int:
        """Tokens of the longest completion."""
        return max(len(row.completion) for row in self.rows)

    def with_garbage(self, value: float) -> Problem:
        """The same problem with `value` (nan, inf) wherever a float belongs to a token that no loss may read."""
        rows = tuple(replace(row, old_logprobs=np.where(row.sampled, row.old_logprobs, value)) for row in self.rows)
        return replace(self, rows=rows)

    def without_tokens(self) -> Problem:
        """The same problem in which no token was sampled by the model."""
        return replace(self, rows=tuple(replace(r, sampled=(False,) * len(r.sampled)) for r in self.rows))

    def without_turns(self) -> Problem:
        """The same problem without error turns."""
        return replace(self, rows=tuple(replace(r, turns=()) for r in self.rows))

    def without_hints(self) -> Problem:
        """The same problem with hints that change nothing."""
        return replace(self, hinted=np.zeros_like(self.hinted))


@dataclass(frozen=True)
class Layout:
    """How the rows of a problem reach the host. The gradient of the step may not depend on it.

    Args:
        micro_batches: row numbers of each micro-batch, in order; of every rank in turn when there are several.
        padding: further padded columns beyond the longest completion of a micro-batch.
        fill: what padded positions hold in every float tensor.
        packed: sequences in one row without padding.
        ranks: data-parallel processes.
        dtype: of the parameters, "float32" or "bfloat16" (or "float64" where a host computes in it).
    """

    micro_batches: tuple[tuple[int, ...], ...]
    padding: int = 0
    fill: float = 0.0
    packed: bool = False
    ranks: int = 1
    dtype: str = "float32"


@dataclass
class Outcome:
    """What one optimizer step of a host came to.

    Args:
        loss: of the step, summed over micro-batches as the host does.
        gradient: (V, V) of the table, summed over micro-batches, averaged or summed over ranks as the host does; a
            vector of some parameters for a language model (`real_model.gradient_of`).
        hinted_gradient: (V, V) of the second table.
        metrics: as the host reports them.
        forwards: how often the model was run: "student", "teacher", "pairs"; empty when the host does not run it.
        teacher_ids: (context, ids of the turn) of every turn that the teacher read; empty when not seen.
        norm: of the gradient of all parameters, where `gradient` holds some of them; None: of `gradient` itself.
    """

    loss: float
    gradient: np.ndarray
    hinted_gradient: np.ndarray | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    teacher_ids: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    norm: float | None = None


def make_problem(
    seed: int,
    *,
    lengths: Sequence[int] = (7, 3, 5, 1, 6, 4),
    tool_tokens: bool = True,
    pairs: Sequence[tuple[int, int]] = ((4, 2), (1, 5), (3, 3)),
    temperature: float = 1.0,
    off_policy: float = 0.3,
    group_size: int = 2,
) -> Problem:
    """Draw a problem.

    Args:
        seed: of everything. lengths: tokens of each completion. tool_tokens: some rows hold a tool's result.
        pairs: tokens of the chosen and the rejected action of each pair.
        temperature: of the rollouts. off_policy: spread of log pi - log pi_old, nats; 0: the ratio is 1.
        group_size: rows of one prompt.
    """
    rng = np.random.default_rng(seed)
    ids = iter(range(FIRST_ID, 10_000))
    size = FIRST_ID + len(lengths) * 2 + sum(lengths) + sum(2 + sum(pair) for pair in pairs)
    table, hinted = rng.normal(size=(size, size)), 0.7 * rng.normal(size=(size, size))
    rows = []
    for number, length in enumerate(lengths):
        prompt, completion = tuple(next(ids) for _ in range(2)), tuple(next(ids) for _ in range(length))
        sampled = np.ones(length, dtype=bool)
        turns: tuple[Turn, ...] = ()
        if tool_tokens and length >= 5:  # a call, its result, another turn, which is the error turn
            sampled[2:4] = False
            turns = (Turn(4, length),)
        elif number % 2 == 0:
            turns = (Turn(0, length),)
        row = Row(prompt, completion, tuple(sampled.tolist()), np.zeros(length), float(rng.normal()), turns)
        old = row_logprobs(table, row.previous, completion, temperature) + off_policy * rng.normal(size=length)
        rows.append(replace(row, old_logprobs=old))
    drawn = tuple(_draw_pair(rng, table, ids, *pair) for pair in pairs)
    return Problem(table, hinted, tuple(rows), drawn, temperature, group_size)


def _draw_pair(rng, table, ids, chosen_length: int, rejected_length: int) -> PairOfRows:
    context = tuple(next(ids) for _ in range(2))
    chosen = tuple(next(ids) for _ in range(chosen_length))
    rejected = tuple(next(ids) for _ in range(rejected_length))
    references = []
    for action in (chosen, rejected):
        logprobs = row_logprobs(table, (context[-1], *action[:-1]), action, 1.0)
        references.append(logprobs + 0.5 * rng.normal(size=len(action)))
    return PairOfRows(context, chosen, rejected, *references)
