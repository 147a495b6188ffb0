"""The token weights of a pair against NumPy in float64, and against the derivative of the DPO loss."""

import numpy as np
import pytest

pytest.importorskip("torch")

from composer_prime_rl.pair_weights import pair_weights

from composer_plugins.config import ReplayDPOConfig


def dpo(c, r, rc, rr, *, beta, eps, normalized, nll):
    """The DPO loss of one pair, float64."""
    shift = [np.sum(np.asarray(a) - np.asarray(b)) / (len(a) if normalized else 1) for a, b in ((c, rc), (r, rr))]
    delta = beta * (shift[0] - shift[1])
    loss = (1 - eps) * np.log1p(np.exp(-delta)) + eps * np.log1p(np.exp(delta))
    return loss - nll * np.mean(c), delta, shift


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("nll", [0.0, 0.3])
def test_the_weights_are_minus_the_derivative_of_the_dpo_loss(eps, normalized, nll):
    rng = np.random.default_rng(1)
    rows = [list(-rng.exponential(1.0, size)) for size in (5, 3, 5, 3)]
    options = dict(beta=0.7, label_smoothing=eps, length_normalized=normalized, nll_weight=nll)
    found = pair_weights(ReplayDPOConfig(**options), *rows)
    oracle = dict(beta=0.7, eps=eps, normalized=normalized, nll=nll)
    _, delta, shift = dpo(*rows, **oracle)
    assert (found.margin, found.chosen_shift, found.rejected_shift) == pytest.approx((delta, *shift))
    for row, weight in ((0, found.chosen), (1, found.rejected)):
        for token in range(len(rows[row])):
            up, down = [list(r) for r in rows], [list(r) for r in rows]
            up[row][token] += 1e-6
            down[row][token] -= 1e-6
            slope = (dpo(*up, **oracle)[0] - dpo(*down, **oracle)[0]) / 2e-6
            assert weight == pytest.approx(-slope, rel=1e-6)


def test_an_action_needs_tokens():
    with pytest.raises(ValueError, match="at least one token"):
        pair_weights(ReplayDPOConfig(), [], [-1.0], [], [-1.0])
