"""The float64 oracle against mpmath with 60 digits, and against cases with a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

mpmath = pytest.importorskip("mpmath")
pytest.importorskip("torch")

from composer_plugins.conformance import oracle
from composer_plugins.conformance.expected import MENU, expected, hinted_tokens, relative_l2
from composer_plugins.conformance.problem import make_problem

mpmath.mp.dps = 60


def exact_logprobs(table, previous, ids, temperature):
    """Log-probabilities with 60 digits."""
    found = []
    for before, token in zip(previous, ids, strict=True):
        logits = [mpmath.mpf(float(x)) / mpmath.mpf(temperature) for x in table[before]]
        found.append(logits[token] - mpmath.log(mpmath.fsum(mpmath.exp(z) for z in logits)))
    return found


def test_a_sum_over_thousands_of_tokens_keeps_its_digits():
    """A DPO margin is a small difference of long sums: 4096 tokens on each side."""
    rng = np.random.default_rng(0)
    table = 8 * rng.normal(size=(40, 40))
    previous, ids = rng.integers(0, 40, 4096), rng.integers(0, 40, 4096)
    found = float(oracle.row_logprobs(table, previous, ids, 0.7).sum())
    exact = mpmath.fsum(exact_logprobs(table, previous, ids, 0.7))
    assert abs(found - float(exact)) / abs(float(exact)) < 1e-14


@pytest.mark.parametrize("margin", [-700.0, -40.0, -1e-9, 0.0, 1e-9, 40.0, 700.0])
def test_the_dpo_loss_of_any_margin(margin):
    one, zero = np.ones((1, 1), dtype=bool), np.zeros((1, 1))
    values, margins = oracle.dpo(np.array([[margin]]), one, zero, zero, one, zero, beta=1.0)
    exact = mpmath.log(1 + mpmath.exp(-mpmath.mpf(margin)))
    assert margins[0] == margin and float(values[0]) == pytest.approx(float(exact), rel=1e-12)


def test_the_whole_step_agrees_with_sixty_digits():
    """Policy (dapo, unclipped by a ratio of 1) and pairs of one problem, digit by digit from the definitions."""
    problem = make_problem(1, off_policy=0.0)
    section = {"policy": {"objective": "dapo"}, "replay_dpo": {"weight": 1.0}}
    parts = expected(problem, section)
    tokens = sum(sum(row.sampled) for row in problem.rows)
    policy = mpmath.fsum(-mpmath.mpf(row.advantage) * sum(row.sampled) for row in problem.rows) / tokens
    assert parts["policy"].loss == pytest.approx(float(policy), rel=1e-12)
    losses = []
    for pair in problem.pairs:
        shifts = []
        for action, reference in ((pair.chosen, pair.ref_chosen), (pair.rejected, pair.ref_rejected)):
            logprobs = exact_logprobs(problem.table, (pair.context[-1], *action[:-1]), action, 1)
            shifts.append(mpmath.fsum(logprobs) - mpmath.fsum(mpmath.mpf(float(x)) for x in reference))
        losses.append(mpmath.log(1 + mpmath.exp(-mpmath.mpf("0.1") * (shifts[0] - shifts[1]))))
    assert parts["replay_dpo"].loss == pytest.approx(float(mpmath.fsum(losses) / len(losses)), rel=1e-12)


def test_reverse_kl_has_its_closed_gradient():
    """d KL(S||T) / d z_i = p_i (log p_i - log q_i - KL) / T."""
    rng = np.random.default_rng(2)
    z, q = rng.normal(size=9), rng.normal(size=9)
    p_s, p_t = oracle.softmax(z, 0.7), oracle.softmax(q, 0.7)
    kl = float((p_s * np.log(p_s / p_t)).sum())
    closed = p_s * (np.log(p_s / p_t) - kl) / 0.7
    numeric = oracle.central(lambda x: float(oracle.full(x[None], q[None], 1.0, 0.7)[0]), z)
    assert relative_l2(numeric, closed) < 1e-8


@pytest.mark.parametrize("name", sorted(MENU))
def test_the_gradient_is_the_derivative_of_the_loss(name):
    """By central differences of the whole loss; cispo and gspo through their stop-gradients are no derivative."""
    problem = make_problem(3, lengths=(3, 2), pairs=((2, 1),))
    section = {"policy": {"objective": name, "length_constant": 16}, "replay_dpo": {"weight": 0.5}}
    if name in ("cispo", "gspo"):
        section = {"policy": {"weight": 0.0}, "replay_dpo": {"weight": 0.5}}
    from dataclasses import replace

    found = expected(problem, section)["total"].gradient
    rows = sorted({i for row in problem.rows for i in row.previous} | {p.context[-1] for p in problem.pairs})
    for before in rows[:4]:
        for token in range(0, len(problem.table), 5):
            moved = []
            for step in (1e-6, -1e-6):
                table = problem.table.copy()
                table[before, token] += step
                moved.append(expected(replace(problem, table=table), section)["total"].loss)
            assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(found[before, token], rel=1e-4, abs=1e-8)


def test_problems_are_what_they_say():
    problem = make_problem(4)
    ids = [i for row in problem.rows for i in (*row.prompt, *row.completion)]
    ids += [i for pair in problem.pairs for i in (*pair.context, *pair.chosen, *pair.rejected)]
    assert len(set(ids)) == len(ids) and max(ids) < len(problem.table)
    assert hinted_tokens(problem) and any(not all(row.sampled) for row in problem.rows)
    assert math.isnan(problem.with_garbage(math.nan).rows[0].old_logprobs[2])


def test_the_outer_step_of_constant_moves_has_a_closed_form():
    """g is the same every round, so b_n = g (1 - mu^n) / (1 - mu); theta falls by lr (g + mu b_n)."""
    moves, lr, momentum, theta = np.array([0.4, 0.8]), 0.7, 0.9, np.ones(1)
    g, local, wanted = 0.6, [], []
    for n in range(1, 6):
        local.append(theta - moves[:, None])
        theta = theta - lr * (g + momentum * g * (1 - momentum**n) / (1 - momentum))
        wanted.append(theta)
    found = oracle.outer(np.array(local), np.ones(1), lr=lr, momentum=momentum)
    assert found == pytest.approx(np.array(wanted), rel=1e-12)
    assert found[:3, 0] == pytest.approx([0.202, -0.9362, -2.38058], abs=1e-12)
    plain = oracle.outer(np.array([[[0.0], [1.0]]]), np.array([5.0]), lr=1.0, momentum=0.0, nesterov=False)
    assert plain[0, 0] == 0.5  # the mean of the islands
