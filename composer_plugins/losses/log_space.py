"""Arithmetic on log-probabilities in which -inf means "ruled out" and never turns into nan."""

from __future__ import annotations

import math

import torch

from composer_plugins.losses.masking import full_precision, masked, safe


def log_softmax(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return log-probabilities (…, V) in at least float32. Raises `ValueError` when temperature <= 0."""
    if not temperature > 0:
        raise ValueError(f"Expected temperature > 0, found {temperature}.")
    logits = full_precision(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def kl_entries(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """p (log p - log q) per entry; 0 where p = 0, inf where p > 0 = q; the gradient is finite everywhere."""
    if _all_possible(first) and _all_possible(second):  # the usual case, at a quarter of the time
        return first.exp() * (first - second)
    has_mass = first.detach().exp() > 0
    infinite = has_mass & second.detach().isneginf()
    finite = has_mass & ~infinite
    log_p, log_q = safe(first, finite), safe(second, finite)
    entries = masked(log_p.exp() * (log_p - log_q), finite)
    return entries.masked_fill(infinite, torch.inf)


def log_mixture(student: torch.Tensor, teacher: torch.Tensor, alpha: float) -> torch.Tensor:
    """log((1 - alpha) S + alpha T) per entry, for 0 < alpha < 1."""
    weights = math.log1p(-alpha), math.log(alpha)
    if _all_possible(student):
        return torch.logaddexp(student + weights[0], teacher + weights[1])
    possible = ~(student.detach().isneginf() & teacher.isneginf())
    mixture = torch.logaddexp(safe(student, possible) + weights[0], safe(teacher, possible) + weights[1])
    return mixture.masked_fill(~possible, -torch.inf)


def with_exact_tail(logprobs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(N, k + 1): the chosen entries and the log of what is left, from the left-over entries themselves."""
    rest = logprobs.scatter(-1, chosen, -torch.inf)
    empty = rest.detach().isneginf().all(-1, keepdim=True)
    tail = torch.logsumexp(rest.masked_fill(empty, 0.0), dim=-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, chosen), tail.masked_fill(empty, -torch.inf)], dim=-1)


def log_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum p) of k log-probabilities, (N, 1); held at the rounding error of 1."""
    total = _logsumexp(logprobs)
    total = total.clamp(max=-torch.finfo(total.dtype).eps)
    return torch.log(-torch.expm1(total))


def renormalized(logprobs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(N, k): the chosen entries as a distribution of their own."""
    return normalize(logprobs.gather(-1, chosen))


def normalize(logprobs: torch.Tensor) -> torch.Tensor:
    """Divide by the mass of the row; a row without mass stays without."""
    total = _logsumexp(logprobs)
    return logprobs - total.masked_fill(total.detach().isneginf(), 0.0)


def _all_possible(logprobs: torch.Tensor) -> bool:
    """True when no entry is -inf (or nan)."""
    return logprobs.numel() == 0 or bool(logprobs.detach().amin() > -torch.inf)


def _logsumexp(logprobs: torch.Tensor) -> torch.Tensor:
    """logsumexp over the last axis, kept; -inf without a nan gradient for a row that is all -inf."""
    empty = logprobs.detach().isneginf().all(-1, keepdim=True)
    return torch.logsumexp(logprobs.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, -torch.inf)
