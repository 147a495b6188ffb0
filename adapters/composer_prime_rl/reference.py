"""How a reference log-prob travels on prime-rl's wire, where 0.0 fills the tokens that have none."""

from __future__ import annotations

from collections.abc import Iterable

#: What a log-prob of exactly 0 (a teacher that is certain) is stamped as: the largest number below it that is kept as
#: it is in float32 and bfloat16 and moves no divergence by more than rounding does.
CERTAIN = -(2.0**-24)


def stamped(logprobs: Iterable[float]) -> list[float]:
    """Return teacher log-probs (nats, one per token) as an environment stamps them: none of them is exactly 0.

    >>> stamped([-1.5, 0.0])
    [-1.5, -5.960464477539063e-08]
    """
    return [min(float(value), CERTAIN) for value in logprobs]
