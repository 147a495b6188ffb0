"""A small batch of a real language model as a problem, in a file, so that hosts in several environments read the same one.

The table of the other problems shows every token's gradient; a language model shows that hosts pad, shift and mask alike
where tokens do attend to each other. Its gradient is compared on the parameters of three layers and the final norm; the norm
is that of all parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from composer_plugins.conformance.problem import PairOfRows, Problem, Row, Turn
from composer_plugins.conformance.table_model import TableForCausalLM, table_model, token_logprobs

#: (prompt, completion of each of two rollouts with what a tool wrote between two bars, hint, advantages)
TEXTS = (
    (
        "User: run the tests\nAgent:", (" pytst -q|\nbash: pytst: not found\n|pytest", " pytest -q|\n3 passed\n|All green."),
        "\nHint: the program is called pytest.\n", (-0.8, 1.1),
    ),
    (
        "User: what is in a.py?\nAgent:", (" cat a.txt|\nNo such file\n|cat a.py", " cat a.py|\nx = 1\n|One line."),
        "\nHint: the file is called a.py.\n", (-0.5, 0.7),
    ),
)  # fmt: skip
PAIR = ("User: list the files\nAgent:", " ls -la", " dir /w please")


def model_of(problem: Problem, dtype: str = "float32"):
    """Return the model of a problem: its table, or the language model that it names."""
    if problem.model is None:
        return table_model(problem, getattr(torch, dtype))
    from composer_plugins.models import load_model

    return load_model(problem.model, dtype=dtype)[0]


def compared(model) -> dict[str, torch.nn.Parameter]:
    """The parameters whose gradients are compared: of the first, the middle and the last layer, and the final norm."""
    last = model.config.num_hidden_layers - 1
    layers = tuple(f"model.layers.{i}." for i in (0, last // 2, last))
    return {n: p for n, p in model.named_parameters() if n.startswith(layers) or n == "model.norm.weight"}


def gradient_of(model) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (gradient, gradient of the hint's table) as an `Outcome` holds them."""
    if isinstance(model, TableForCausalLM):
        return _gradient(model.model.table.weight), _gradient(model.model.hinted.weight)
    parts = [_gradient(p).reshape(-1) for p in compared(model).values()]
    return np.concatenate(parts).astype(np.float32), None


def norm_of(model) -> float | None:
    """Return the norm of the whole gradient; None for a table, whose gradient is all there is."""
    if isinstance(model, TableForCausalLM):
        return None
    squares = (p.grad.double().square().sum() for p in model.parameters() if p.grad is not None)
    return float(torch.stack(list(squares)).sum().sqrt())


def _gradient(parameter: torch.nn.Parameter) -> np.ndarray:
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return gradient.double().numpy()


class ModelScores:
    """A language model, and slopes sent back through it; see `expected.TableScores`.

    Args:
        problem: of the model. dtype: "float64" for the reference; "float32" shows what rounding alone does to it.
    """

    def __init__(self, problem: Problem, dtype: str = "float64") -> None:
        self.problem, self.model = problem, model_of(problem).to(getattr(torch, dtype))
        self.norm, self._taken, self._sum = 0.0, 0.0, torch.zeros(())
        self._scored: dict[Any, torch.Tensor] = {}

    def _with_gradient(self, context: Sequence[int], ids: Sequence[int], temperature: float) -> torch.Tensor:
        key = (tuple(context), tuple(ids), temperature)
        if key not in self._scored:
            self._scored[key] = token_logprobs(self.model, context, ids, temperature=temperature)
        return self._scored[key]

    def logprobs(self, context: Sequence[int], ids: Sequence[int], temperature: float) -> np.ndarray:
        return self._with_gradient(context, ids, temperature).detach().double().numpy()

    def taught(self, row: Row, turn: Turn) -> np.ndarray:
        ids = row.completion[turn.start : turn.end]
        with torch.no_grad():
            found = token_logprobs(self.model, row.hinted_context(turn), ids, temperature=self.problem.temperature)
        return found.double().numpy()

    def add(self, context: Sequence[int], ids: Sequence[int], slopes: np.ndarray, temperature: float) -> None:
        found = self._with_gradient(context, ids, temperature)
        self._sum = self._sum + (found * torch.tensor(slopes, dtype=found.dtype)).sum()

    def take(self) -> np.ndarray:
        """The gradient of what was added since the last call; `norm` becomes that of everything."""
        self._sum.backward(retain_graph=True)
        self._sum = torch.zeros(())
        self.norm, whole = norm_of(self.model), gradient_of(self.model)[0]
        found, self._taken = whole - self._taken, whole
        return found


def make_batch(name: str, *, off_policy: float) -> Problem:
    """Tokenize the texts and score them with the model itself: old log-probs and the pair's references lie around its own.

    Args:
        name: a model reference. off_policy: spread of log pi - log pi_old, nats; 0: the ratio is 1.
    """
    from composer_plugins.models import load_model

    model, tokenizer = load_model(name)
    rng = np.random.default_rng(7)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    def scored(context, action, spread: float) -> np.ndarray:
        with torch.no_grad():
            found = token_logprobs(model, context, action).double().numpy()
        return found + spread * rng.normal(size=len(found))

    rows = []
    for prompt, completions, hint, advantages in TEXTS:
        for number, (text, advantage) in enumerate(zip(completions, advantages, strict=True)):
            parts = [ids(part) for part in text.split("|")]
            sampled = [kind != 1 for kind, part in enumerate(parts) for _ in part]
            turns = (Turn(0, len(parts[0]), ids(hint)),) if number == 0 else ()
            completion = tuple(i for part in parts for i in part)
            old = scored(ids(prompt), completion, off_policy)
            rows.append(Row(ids(prompt), completion, tuple(sampled), old, advantage, turns))
    context, chosen, rejected = (ids(text) for text in PAIR)
    pair = PairOfRows(context, chosen, rejected, *(scored(context, side, 0.5) for side in (chosen, rejected)))
    empty = np.zeros((0, 0))
    return Problem(empty, empty, tuple(rows), (pair,), model=name, vocabulary=model.config.vocab_size)


def save_batch(problem: Problem, path: Path) -> None:
    """Write a batch as JSON."""
    fields = {"rows": problem.rows, "pairs": problem.pairs}
    records: dict[str, Any] = {name: [asdict(one) for one in found] for name, found in fields.items()}
    records |= {"model": problem.model, "vocabulary": problem.vocabulary}
    path.write_text(json.dumps(records, default=lambda array: array.tolist(), indent=1))


@cache
def load_batch(path: Path) -> Problem:
    """Read what `save_batch` wrote."""
    data = json.loads(path.read_text())
    rows = tuple(
        Row(
            tuple(r["prompt"]), tuple(r["completion"]), tuple(r["sampled"]), np.array(r["old_logprobs"]), r["advantage"],
            tuple(Turn(t["start"], t["end"], tuple(t["hint"])) for t in r["turns"]),
        )
        for r in data["rows"]
    )  # fmt: skip
    pairs = tuple(
        PairOfRows(
            tuple(p["context"]), tuple(p["chosen"]), tuple(p["rejected"]), np.array(p["ref_chosen"]),
            np.array(p["ref_rejected"]), p["weight"],
        )
        for p in data["pairs"]
    )  # fmt: skip
    empty = np.zeros((0, 0))
    return Problem(empty, empty, rows, pairs, model=data["model"], vocabulary=data["vocabulary"])
