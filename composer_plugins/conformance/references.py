"""Losses of others as functions on the same tensors, for the parity report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from composer_plugins.conformance.problem import Problem, Row
from composer_plugins.conformance.real_model import gradient_of
from composer_plugins.conformance.table_model import table_model, token_logits

#: Loss of a problem and its gradient (V, V) with respect to the table.
Run = Callable[[Problem], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class Reference:
    """One outside loss beside a case of the report.

    Args:
        case: name of the case, whose formula and options are ours.
        name: whose loss it is and its settings.
        run: the loss on the case's problem.
        differs: why it is another loss, and the option of ours that gives it; empty: the semantics agree, and the
            gradients must.
    """

    case: str
    name: str
    run: Run
    differs: str = ""


class Tensors:
    """A problem as tensors (B, T) and (B, T, V), padded on the right; what losses of trainers take.

    `logprobs` and `student` carry gradient to the table; `taught` and `teacher` (log-probs and logits under the hint)
    do not and are zero where nothing is hinted.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, table_model(problem)
        rows, t = problem.rows, problem.temperature
        self.student = self._padded([token_logits(self.model, row.prompt, row.completion) / t for row in rows])
        with torch.no_grad():
            self.teacher = self._padded([self._hinted_logits(row) / t for row in rows])
        self.ids = self._padded([torch.tensor(row.completion) for row in rows])
        self.mask = self._padded([torch.tensor(row.sampled) for row in rows])
        self.hinted = self._padded([self._is_hinted(row) for row in rows]) & self.mask
        self.old = self._padded([torch.tensor(row.old_logprobs, dtype=torch.float32) for row in rows])
        self.advantages = torch.tensor([row.advantage for row in rows])[:, None].expand(self.mask.shape).float()
        self.logprobs = self._of_ids(self.student)
        self.taught = self._of_ids(self.teacher)

    def finish(self, loss: torch.Tensor) -> tuple[float, np.ndarray]:
        """Backpropagate a loss; return it and the gradient of the table."""
        loss.backward()
        return float(loss.detach()), gradient_of(self.model)[0]

    def _padded(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _of_ids(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, -1).gather(-1, self.ids[..., None])[..., 0]

    def _hinted_logits(self, row: Row) -> torch.Tensor:
        found = torch.zeros(len(row.completion), self.problem.vocabulary)
        for turn in row.turns:
            ids = row.completion[turn.start : turn.end]
            found[turn.start : turn.end] = token_logits(self.model, row.hinted_context(turn), ids)
        return found

    @staticmethod
    def _is_hinted(row: Row) -> torch.Tensor:
        found = torch.zeros(len(row.completion), dtype=torch.bool)
        for turn in row.turns:
            found[turn.start : turn.end] = True
        return found
