"""Divergences against the float64 oracle, value and gradient; masked vocabulary entries; identities."""

import itertools

import numpy as np
import pytest
import torch

from composer_plugins.losses.divergence import (
    divergence_from_logprobs,
    full_divergence,
    importance_weight,
    sampled_log_ratio,
    sampled_reverse_kl,
    topk_divergence,
    topk_divergence_from_logprobs,
    trust_region_logits,
)

ALPHAS = [0.0, 0.05, 0.5, 0.9, 1.0]
NEG = -np.inf


def logits(rng, rows=4, vocabulary=9):
    return rng.normal(size=(rows, vocabulary)) * 2, rng.normal(size=(rows, vocabulary)) * 2


def compare(function, reference, oracle, student, teacher, *, tolerance=1e-8, **options):
    x = torch.tensor(student, requires_grad=True)
    values = function(x, torch.tensor(teacher), **options)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    np.testing.assert_allclose(values.detach(), reference(student, teacher, **options), atol=1e-11)
    expected = oracle.central(lambda z: reference(z, teacher, **options).sum(), student)
    np.testing.assert_allclose(gradient, expected, atol=tolerance)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.1])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_full(alpha, temperature, entry_clip, oracle, rng):
    options = {"alpha": alpha, "temperature": temperature, "entry_clip": entry_clip}
    compare(full_divergence, oracle.full, oracle, *logits(rng), **options)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_topk(alpha, of, tail, temperature, oracle, rng):
    options = {"alpha": alpha, "k": 3, "of": of, "tail": tail, "temperature": temperature}
    compare(topk_divergence, oracle.topk, oracle, *logits(rng), **options)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_topk_from_logprobs_equals_topk_from_logits(alpha, tail, rng):
    """A host that sees k ids must get what a host with logits gets, gradient included."""
    student, teacher = map(torch.tensor, logits(rng))
    x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
    whole = topk_divergence(x, teacher, alpha=alpha, k=4, tail=tail, entry_clip=0.2)
    ids = student.topk(4).indices
    seen = [z.log_softmax(-1).gather(-1, ids) for z in (y, teacher)]
    few = topk_divergence_from_logprobs(*seen, alpha=alpha, tail=tail, entry_clip=0.2)
    torch.testing.assert_close(few, whole)
    torch.testing.assert_close(
        torch.autograd.grad(few.sum(), y)[0], torch.autograd.grad(whole.sum(), x)[0], atol=1e-9, rtol=1e-7
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_forward_and_reverse_follow_from_the_closed_form_of_the_gradient(alpha, rng):
    """dKL(T||S)/dz = S - T and dKL(S||T)/dz = S (log S/T - KL): no central differences involved."""
    student, teacher = map(torch.tensor, logits(rng))
    x = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(full_divergence(x, teacher, alpha=alpha).sum(), x)
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = s if alpha in (0.0, 1.0) else (1 - alpha) * s + alpha * t
    if alpha == 0.0:
        expected = s - t
    else:
        g = (s / (t if alpha == 1.0 else m)).log() * (1.0 if alpha == 1.0 else 1 - alpha)
        expected = s * (g - (s * g).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_more_entries_never_lower_the_divergence_with_a_tail(rng):
    student, teacher = map(torch.tensor, logits(rng, rows=20))
    for alpha in ALPHAS:
        full = full_divergence(student, teacher, alpha=alpha)
        steps = [topk_divergence(student, teacher, alpha=alpha, k=k) for k in range(1, 10)]
        for smaller, larger in itertools.pairwise([*steps, full]):
            assert (smaller <= larger + 1e-12).all()
        torch.testing.assert_close(steps[-1], full)


def test_k_beyond_the_vocabulary_is_the_full_divergence(rng):
    student, teacher = map(torch.tensor, logits(rng))
    torch.testing.assert_close(
        topk_divergence(student, teacher, alpha=1.0, k=100), full_divergence(student, teacher, alpha=1.0)
    )


def test_the_tail_is_exact_even_when_tiny():
    """A left-over mass of 1e-12 in float32: 1 - sum p is pure rounding, the left-over logits are not."""
    student = torch.tensor([[0.0, -28.0, -30.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -3.0, -30.0]])
    exact = topk_divergence(student.double(), teacher.double(), alpha=0.0, k=1)
    got = topk_divergence(student, teacher, alpha=0.0, k=1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    assert torch.autograd.grad(got.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("tail", [True, False])
def test_all_mass_in_the_top_k_is_finite(tail):
    student = torch.tensor([[0.0, -1.0]], requires_grad=True)
    seen = student.log_softmax(-1)
    values = topk_divergence_from_logprobs(seen, torch.tensor([[0.3, 0.7]]).log(), alpha=1.0, tail=tail)
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), student)[0].isfinite().all()


def ruled_out(rng, where):
    student, teacher = logits(rng)
    if where in ("student", "both"):
        student[:, [2, 5]] = NEG
    if where in ("teacher", "both"):
        teacher[:, [2, 5]] = NEG
    return student, teacher


def finite(alpha, where):
    return where == "both" or 0 < alpha < 1 or (alpha == 0.0) == (where == "teacher")


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
@pytest.mark.parametrize("k", [None, 3, 8])
def test_masked_vocabulary_entries(alpha, where, k, oracle, rng):
    """0 log 0 = 0; the divergence is finite where it is mathematically, and inf (never nan) where it is not."""
    student, teacher = ruled_out(rng, where)
    x = torch.tensor(student, requires_grad=True)
    if k is None:
        values = full_divergence(x, torch.tensor(teacher), alpha=alpha)
        expected = oracle.full(student, teacher, alpha)
    else:
        values = topk_divergence(x, torch.tensor(teacher), alpha=alpha, k=k)
        expected = oracle.topk(student, teacher, alpha, k)
    np.testing.assert_allclose(values.detach(), expected, atol=1e-11)
    if k is None:
        assert np.isfinite(expected).all() == finite(alpha, where)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[:, [2, 5]] == 0).all() or where == "teacher"


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_an_entry_clip_makes_an_infinite_divergence_finite(alpha, oracle, rng):
    student, teacher = ruled_out(rng, "student" if alpha == 0.0 else "teacher")
    x = torch.tensor(student, requires_grad=True)
    values = full_divergence(x, torch.tensor(teacher), alpha=alpha, entry_clip=0.05)
    np.testing.assert_allclose(values.detach(), oracle.full(student, teacher, alpha, entry_clip=0.05), atol=1e-11)
    assert torch.autograd.grad(values.sum(), x)[0].isfinite().all()


def test_an_underflowing_probability_against_a_ruled_out_one_is_no_nan():
    student = torch.tensor([[0.0, -200.0]], requires_grad=True)
    values = full_divergence(student, torch.tensor([[0.0, NEG]]), alpha=1.0)
    values.sum().backward()
    assert values.item() == 0.0
    assert student.grad.isfinite().all()


def test_equal_distributions_give_exactly_zero_and_no_gradient(rng):
    same = torch.tensor(logits(rng)[0], dtype=torch.float32)
    for alpha in (0.0, 1.0):
        x = same.clone().requires_grad_()
        values = full_divergence(x, same, alpha=alpha)
        assert values.count_nonzero() == 0
        assert torch.autograd.grad(values.sum(), x)[0].abs().max() < 1e-6


def test_the_generalised_jsd_is_discontinuous_at_its_ends(rng):
    """Why resolve_level warns: alpha 1e-3 gives about 1/1000 of the alpha 0 loss."""
    student, teacher = map(torch.tensor, logits(rng))
    forward = full_divergence(student, teacher, alpha=0.0).mean()
    ratio = full_divergence(student, teacher, alpha=1e-3).mean() / forward
    assert 1e-4 < ratio < 2e-3


def test_the_sampled_surrogate_has_the_gradient_of_the_reverse_kl_in_expectation(rng):
    """Sum over every token of S(y) * surrogate gradient(y) = gradient of the full reverse KL."""
    student, teacher = map(torch.tensor, logits(rng, rows=1))
    x = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(full_divergence(x, teacher, alpha=1.0).sum(), x)
    y = student.clone().requires_grad_()
    logp, mask = y.log_softmax(-1)[0], torch.ones(9, dtype=torch.bool)
    values = sampled_reverse_kl(logp, teacher.log_softmax(-1)[0], mask)
    (got,) = torch.autograd.grad((student.softmax(-1)[0] * values).sum(), y)
    torch.testing.assert_close(got, expected)
    metric = (student.softmax(-1)[0] * sampled_log_ratio(logp, teacher.log_softmax(-1)[0], mask)).sum()
    torch.testing.assert_close(metric, full_divergence(student, teacher, alpha=1.0).sum())


def test_trust_region_is_the_normalised_geometric_mixture(oracle, rng):
    reference, live = logits(rng)
    got = trust_region_logits(torch.tensor(reference), torch.tensor(live), mix=0.3)
    product = oracle.softmax(reference) ** 0.7 * oracle.softmax(live) ** 0.3
    np.testing.assert_allclose(got.exp(), product / product.sum(-1, keepdims=True), atol=1e-12)
    for mix, end in ((0.0, reference), (1.0, live)):
        end[:, 1] = NEG
        got = trust_region_logits(torch.tensor(reference), torch.tensor(live), mix=mix)
        np.testing.assert_allclose(got.exp(), oracle.softmax(end), atol=1e-12)
        assert not got.isnan().any()


def test_trust_region_gives_no_gradient_to_either_side(rng):
    a, b = (torch.tensor(x, requires_grad=True) for x in logits(rng))
    assert not trust_region_logits(a, b, mix=0.5).requires_grad


def test_importance_weight(rng):
    logp, old = torch.tensor(rng.normal(size=50)), torch.tensor(rng.normal(size=50))
    got = importance_weight(logp.requires_grad_(), old, torch.ones(50, dtype=torch.bool), cap=2.0)
    np.testing.assert_allclose(got, np.minimum(np.exp((logp - old).detach().numpy()), 2.0), atol=1e-12)
    assert not got.requires_grad
    assert (got == 2.0).any()
    assert (got < 1).any()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s, t: full_divergence(s, t, alpha=1.5), "alpha"),
        (lambda s, t: full_divergence(s, t, alpha=1.0, temperature=0.0), "temperature"),
        (lambda s, t: full_divergence(s, t, alpha=1.0, entry_clip=0.0), "entry_clip"),
        (lambda s, t: full_divergence(s, t[:2], alpha=1.0), "one shape"),
        (lambda s, t: full_divergence(s[0], t[0], alpha=1.0), "tokens, entries"),
        (lambda s, t: topk_divergence(s, t, alpha=1.0, k=0), "k >= 1"),
        (lambda s, t: topk_divergence(s, t, alpha=1.0, k=2, of="both"), "student"),
        (lambda s, t: trust_region_logits(s, t, mix=2.0), "mix"),
        (lambda s, t: divergence_from_logprobs(s, t, alpha=1.0, mask=torch.ones(3, dtype=torch.bool)), "mask"),
        (lambda s, t: importance_weight(s, t, torch.ones_like(s, dtype=torch.bool), cap=0.0), "cap"),
    ],
)
def test_bad_arguments(call, match, rng):
    with pytest.raises(ValueError, match=match):
        call(*map(torch.tensor, logits(rng)))
