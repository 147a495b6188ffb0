"""Channel 2: divergences between the student and its hint-reading self, per token.

Direction `alpha`: 0 is forward KL(T||S), 1 is reverse KL(S||T), between them the generalised Jensen-Shannon
divergence alpha KL(T||m) + (1 - alpha) KL(S||m) with m = (1 - alpha) S + alpha T. It is discontinuous at the
ends: alpha 1e-3 gives about 1/1000 of the loss at alpha 0.

Zero probabilities: an entry that the first argument of a KL rules out (log-probability -inf) contributes 0.
The KL is truly infinite where its first argument has mass and its second has none (forward: the teacher
allows a token that the student's mask forbids; reverse: the other way round). Then the value is inf, and the
gradient is that of the finite entries. The generalised Jensen-Shannon divergence is always finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from composer_plugins.losses.log_space import (
    kl_entries,
    log_mixture,
    log_rest,
    log_softmax,
    normalize,
    renormalized,
    with_exact_tail,
)
from composer_plugins.losses.masking import check_mask, check_same_shape, full_precision, masked, safe


def divergence_from_logprobs(
    student_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    alpha: float,
    entry_clip: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence per token over K categories, to be minimised; not reduced.

    alpha 0: sum_k T (log T - log S). alpha 1: sum_k S (log S - log T).
    Between: sum_k [alpha T (log T - log m) + (1 - alpha) S (log S - log m)].

    Args:
        student_logprobs: (N, K), nats, each row a distribution; receives gradient.
        teacher_logprobs: (N, K), nats; detached inside.
        alpha: direction in [0, 1].
        entry_clip: upper bound of each entry's contribution in nats, > 0; None: off. The loss is then no
            divergence any more and may be negative.
        mask: (N,) bool, True = counts; None: every token.

    Returns:
        (N,), nats; inf where the KL is infinite (see the module).

    Raises:
        ValueError: shapes do not fit, or alpha or entry_clip is out of range.

    Source: SDPO arXiv:2601.20802; generalised JSD: GKD arXiv:2306.13649 section 2 (its beta is alpha);
    entry clip: OPSD arXiv:2601.18734.
    trl/experimental/sdpo/loss_utils.py `compute_divergence`.

    >>> half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> divergence_from_logprobs(half, quarter, alpha=1.0)  # 1/2 log 2 + 1/2 log 2/3
    tensor([0.1438])
    """
    _check_options(alpha, entry_clip)
    student, teacher, mask = _rows(student_logprobs, teacher_logprobs, mask)
    if alpha == 0.0:
        entries = kl_entries(teacher, student)
    elif alpha == 1.0:
        entries = kl_entries(student, teacher)
    else:
        mixture = log_mixture(student, teacher, alpha)
        entries = alpha * kl_entries(teacher, mixture) + (1 - alpha) * kl_entries(student, mixture)
    if entry_clip is not None:
        entries = entries.clamp(max=entry_clip)
    return masked(entries.sum(-1), mask)


def full_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence per token over the whole vocabulary, to be minimised; not reduced.

    `divergence_from_logprobs` of log_softmax(logits / temperature). No factor temperature^2.

    Args:
        student_logits: (N, V), receives gradient; -inf = ruled out.
        teacher_logits: (N, V); detached inside.
        alpha, entry_clip, mask: as `divergence_from_logprobs`.
        temperature: divides both logits, > 0.

    Returns:
        (N,), nats.

    Raises:
        ValueError: as `divergence_from_logprobs`, or temperature <= 0.

    Source: SDPO arXiv:2601.20802; trl/experimental/sdpo/loss_utils.py `compute_full_logit_self_distillation_loss`.

    >>> full_divergence(torch.zeros(1, 4), torch.zeros(1, 4), alpha=1.0)
    tensor([0.])
    """
    student, teacher, mask = _rows(student_logits, teacher_logits, mask)
    return divergence_from_logprobs(
        log_softmax(student, temperature),
        log_softmax(teacher, temperature),
        alpha=alpha,
        entry_clip=entry_clip,
        mask=mask,
    )


def topk_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    alpha: float,
    k: int,
    of: Literal["student", "teacher"] = "student",
    tail: bool = True,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence per token over k vocabulary entries, to be minimised; not reduced.

    The k entries are the most likely ones of the student (SDPO) or of the teacher (OPSD). What is left,
    1 - sum p, becomes one more category (`tail`; computed from the left-over logits, so it is exact even
    when tiny), or both sides are renormalised over the k entries. With a tail the result never exceeds the
    full divergence (data processing inequality, without an entry clip). k >= V is the full divergence.

    Args:
        student_logits: (N, V), receives gradient (not through the choice of entries).
        teacher_logits: (N, V); detached inside.
        alpha, temperature, entry_clip, mask: as `full_divergence`.
        k: number of entries, > 0.
        of: whose most likely entries.
        tail: keep the left-over mass as one bucket; False: renormalise.

    Returns:
        (N,), nats.

    Raises:
        ValueError: as `full_divergence`, or k < 1, or `of` is unknown.

    Source: SDPO arXiv:2601.20802 (top-k of the student with a tail); OPSD arXiv:2601.18734 (of the teacher);
    trl/experimental/sdpo/loss_utils.py `compute_topk_self_distillation_loss`.

    >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
    >>> topk_divergence(logits, logits.flip(-1), alpha=1.0, k=1, tail=False)  # one entry: nothing to compare
    tensor([0.])
    """
    if k < 1:
        raise ValueError(f"Expected k >= 1, found {k}.")
    if of not in ("student", "teacher"):
        raise ValueError(f"Expected of 'student' or 'teacher', found {of!r}.")
    student, teacher, mask = _rows(student_logits, teacher_logits, mask)
    student, teacher = log_softmax(student, temperature), log_softmax(teacher, temperature)
    if k < student.size(-1):
        chosen = (student if of == "student" else teacher).detach().topk(k, dim=-1).indices
        project = with_exact_tail if tail else renormalized
        student, teacher = project(student, chosen), project(teacher, chosen)
    return divergence_from_logprobs(student, teacher, alpha=alpha, entry_clip=entry_clip, mask=mask)


def topk_divergence_from_logprobs(
    student_topk_logprobs: torch.Tensor,
    teacher_topk_logprobs: torch.Tensor,
    *,
    alpha: float,
    tail: bool = True,
    entry_clip: float | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`topk_divergence` for hosts that see only k log-probabilities per token, at the same ids on both sides.

    The tail is log(1 - sum p) = log(-expm1(logsumexp)); it is held at the rounding error of 1 (1.2e-7 in
    float32), below which the difference carries no information.

    Args:
        student_topk_logprobs: (N, k), nats, normalised over the **whole** vocabulary; receives gradient.
        teacher_topk_logprobs: (N, k) at the same ids; detached inside.
        alpha, tail, entry_clip, mask: as `topk_divergence`.

    Returns:
        (N,), nats.

    Raises:
        ValueError: as `divergence_from_logprobs`.

    Source: trl/experimental/sdpo/loss_utils.py `add_tail_bucket`.

    >>> student, teacher = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    >>> topk_divergence_from_logprobs(student, teacher, alpha=1.0)  # (1/2, 1/2) against (1/4, 3/4)
    tensor([0.1438])
    """
    student, teacher, mask = _rows(student_topk_logprobs, teacher_topk_logprobs, mask)
    if tail:
        student, teacher = (torch.cat([x, log_rest(x)], dim=-1) for x in (student, teacher))
    else:
        student, teacher = normalize(student), normalize(teacher)
    return divergence_from_logprobs(student, teacher, alpha=alpha, entry_clip=entry_clip, mask=mask)


def sampled_reverse_kl(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Per-token surrogate of KL(S||T) from the sampled tokens, to be minimised; masked, not reduced.

    sg(log pi - log pi_T) log pi. Its **gradient** is the score-function estimate of the reverse KL's; its
    value means nothing: log `sampled_log_ratio` instead.

    Args:
        logprobs: any shape, nats, of the tokens that the student sampled; receives gradient.
        teacher_logprobs: same shape; detached inside.
        mask: same shape, bool.

    Returns:
        Same shape, nats^2.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.

    Source: SDPO arXiv:2601.20802 (token-level reverse KL);
    trl/experimental/sdpo/loss_utils.py `compute_sampled_token_self_distillation_loss`.

    >>> sampled_reverse_kl(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([True]))
    tensor([-2.])
    """
    log_ratio = sampled_log_ratio(logprobs, teacher_logprobs, mask)
    return masked(log_ratio * safe(logprobs, mask), mask)


def sampled_log_ratio(logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log pi - log pi_T of the sampled tokens, detached: over many of them, the reverse KL in nats.

    Args and Raises: as `sampled_reverse_kl`. One token's value may be negative.

    >>> sampled_log_ratio(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([True]))
    tensor([2.])
    """
    check_same_shape(logprobs=logprobs, teacher_logprobs=teacher_logprobs, mask=mask)
    return masked(safe(logprobs.detach(), mask) - safe(teacher_logprobs.detach(), mask), mask)


def trust_region_logits(ref_logits: torch.Tensor, live_logits: torch.Tensor, *, mix: float) -> torch.Tensor:
    """Return logits of q proportional to q_ref^(1 - mix) q_live^mix, detached.

    Args:
        ref_logits: (N, V) of the frozen initial weights reading the hint; -inf = ruled out.
        live_logits: (N, V) of the current weights reading the hint.
        mix: in [0, 1]; 0 is the reference, 1 the live teacher.

    Returns:
        (N, V) normalised log-probabilities, nats. A token that either side rules out is ruled out
        (for 0 < mix < 1).

    Raises:
        ValueError: the shapes differ, or mix is outside [0, 1].

    Source: SDPO arXiv:2601.20802 (trust-region teacher); code lasgroup/SDPO.

    >>> zero, tilted = torch.zeros(1, 2), torch.tensor([[0.0, 2.0]])
    >>> trust_region_logits(zero, tilted, mix=0.5).softmax(-1)[0, 1]  # sigmoid(1)
    tensor(0.7311)
    """
    check_same_shape(ref_logits=ref_logits, live_logits=live_logits)
    if not 0 <= mix <= 1:
        raise ValueError(f"Expected mix in [0, 1], found {mix}.")
    reference = torch.log_softmax(full_precision(ref_logits.detach()), dim=-1)
    live = torch.log_softmax(full_precision(live_logits.detach()), dim=-1)
    if mix in (0.0, 1.0):  # 0 * -inf
        return live if mix else reference
    return torch.log_softmax((1 - mix) * reference + mix * live, dim=-1)


def importance_weight(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """Return min(pi / pi_old, cap) per token, detached; 0 outside the mask.

    Args:
        logprobs: any shape, nats.
        old_logprobs: same shape, nats, of the policy that sampled the tokens.
        mask: same shape, bool.
        cap: upper bound, > 0 (lasgroup/SDPO and TRL: 2).

    Raises:
        ValueError: the shapes differ, the mask is not bool, or cap <= 0.

    Source: lasgroup/SDPO; trl/experimental/sdpo/loss_utils.py `apply_importance_sampling_clipping`.

    >>> importance_weight(torch.zeros(2), torch.tensor([0.0, -5.0]), torch.tensor([True, True]), cap=2.0)
    tensor([1., 2.])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    if not cap > 0:
        raise ValueError(f"Expected cap > 0, found {cap}.")
    log_ratio = safe(logprobs.detach(), mask) - safe(old_logprobs.detach(), mask)
    return masked(log_ratio.clamp(max=math.log(cap)).exp(), mask)


def _rows(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check (N, K) shapes, detach the teacher, and make both safe under the mask."""
    shape = check_same_shape(student=student, teacher=teacher)
    if len(shape) != 2:
        raise ValueError(f"Expected shape (tokens, entries), found {tuple(shape)}.")
    teacher = teacher.detach()
    if mask is None:
        mask = torch.ones(shape[0], dtype=torch.bool, device=student.device)
        return full_precision(student), full_precision(teacher), mask
    check_mask(mask, shape[:1])
    return safe(student, mask[:, None]), safe(teacher, mask[:, None]), mask


def _check_options(alpha: float, entry_clip: float | None) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"Expected alpha in [0, 1] (0 forward, 1 reverse KL), found {alpha}.")
    if entry_clip is not None and not entry_clip > 0:
        raise ValueError(f"Expected entry_clip > 0 in nats, found {entry_clip}.")
