"""Exact-match accuracy on held-out prompts, and its mean and interval over seeds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

import torch

from benchmarks.held_out.arms import Feedback, error_message
from benchmarks.held_out.base_model import Contexts
from benchmarks.held_out.task import CALL_LENGTH, KINDS, Task, calls

#: Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930,
)  # fmt: skip
MAX_SEEDS = len(T_95) + 1


@torch.no_grad()
def accuracy(
    model,
    tokenizer,
    task: Task,
    *,
    per_name: int,
    samples: int,
    feedback: Feedback | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return exact-match accuracy on held-out prompts, greedy and sampled at temperature 1, in total and per kind.

    Args:
        per_name: held-out prompts per name; the same ones for every model of a seed.
        samples: completions per prompt for the sampled figure.
        feedback: put an error message into the context, as the self-teacher reads it; None: the bare prompt.
        seed: of the prompts and of the sampling; the caller's random state is left as it was.
    """
    contexts, rng = Contexts(tokenizer), random.Random(f"evaluation {seed}")
    asked = calls("held_out", per_name, seed)
    messages = [None if feedback is None else error_message(task, n, feedback, rng) for n, _ in asked]
    ids = torch.tensor([contexts.ids(n, d, m) for (n, d), m in zip(asked, messages, strict=True)])
    was_training = model.training
    model.eval()
    result = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for mode, repeats in (("greedy", 1), ("sampled", samples)):
            texts = _complete(model, tokenizer, ids.repeat_interleave(repeats, 0), sample=mode == "sampled")
            every = [call for call in asked for _ in range(repeats)]
            right = [text == task.answer(*call) for text, call in zip(texts, every, strict=True)]
            result[mode] = statistics.fmean(right)
            for kind in KINDS:
                of_kind = [r for r, (name, _) in zip(right, every, strict=True) if task.kind[name] == kind]
                result[f"{mode}/{kind}"] = statistics.fmean(of_kind)
    model.train(was_training)
    return result


def _complete(model, tokenizer, ids: torch.Tensor, *, sample: bool) -> list[str]:
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=CALL_LENGTH + 1, **options
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half-width of the 95 % t-interval) of independent values.

    >>> [round(x, 4) for x in interval([0.0, 1.0, 2.0])]
    [1.0, 2.4842]
    """
    if not 2 <= len(values) <= MAX_SEEDS:
        raise ValueError(f"Expected 2 to {MAX_SEEDS} values for an interval, found {len(values)}.")
    half = T_95[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), half
