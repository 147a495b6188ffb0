"""The task: an opaque name and five digits go in, a function call with its result comes out.

`zib 4 7 1 9 0` asks for `reverse 0 9 1 7 4` when `zib` secretly means `reverse`. What a name means cannot be read
off the prompt; a failed attempt can be answered by an error message that says it. Digit strings are split by hash
into three disjoint parts: pre-training, RL prompts and held-out prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

LENGTH = 5
CALL_LENGTH = LENGTH + 2  # tokens of a completion: function, digits, end of turn
NAMES = ("zib", "mox", "lur", "kep", "dav", "fuz", "nog", "pel", "ryt", "sab", "tiv", "wem")
OPERATIONS: dict[str, Callable[[str], str]] = {
    "reverse": lambda s: s[::-1],
    "left": lambda s: s[1:] + s[0],
    "right": lambda s: s[-1] + s[:-1],
    "ends": lambda s: s[-1] + s[1:-1] + s[0],
    "up": lambda s: "".join(str((int(c) + 1) % 10) for c in s),
    "down": lambda s: "".join(str((int(c) - 1) % 10) for c in s),
}
Part = Literal["pretraining", "train", "held_out"]
_PARTS: tuple[Part, ...] = ("pretraining",) * 8 + ("train", "held_out")

#: How often the base model follows the right operation of a name, and how often one certain wrong one; the rest
#: is spread evenly. A third of the names each, so the base is neither useless nor done, greedy or sampled.
KINDS: dict[str, tuple[float, float]] = {"known": (0.70, 0.15), "confused": (0.25, 0.55), "rare": (0.05, 0.65)}

#: What the environment says about a failed call, per feedback mode of an arm.
UNINFORMATIVE = "{name} failed: wrong function"
INFORMATIVE = "{name} failed: use the function {operation}"


def part_of(digits: str) -> Part:
    """Return the part of the data that `digits` belongs to: 80 % pre-training, 10 % train, 10 % held out.

    >>> part_of("12345") in ("pretraining", "train", "held_out")
    True
    """
    return _PARTS[hashlib.sha256(digits.encode()).digest()[0] % len(_PARTS)]


def strings(part: Part) -> list[str]:
    """Return every digit string of `part` on which all operations disagree, in order."""
    every = ("".join(digits) for digits in product("0123456789", repeat=LENGTH))
    return [s for s in every if part_of(s) == part and len({f(s) for f in OPERATIONS.values()}) == len(OPERATIONS)]


@dataclass(frozen=True)
class Task:
    """What the names mean under one seed, and what the base model believes.

    Args:
        meaning: the operation of each name.
        kind: the entry of `KINDS` of each name.
        prior: per name, the probability with which pre-training follows each operation.
    """

    meaning: dict[str, str]
    kind: dict[str, str]
    prior: dict[str, dict[str, float]]

    def answer(self, name: str, digits: str) -> str:
        """Return the right completion."""
        return completion(self.meaning[name], digits)


def make_task(seed: int) -> Task:
    """Draw meanings, kinds and the base model's beliefs; every operation is the meaning of two names."""
    rng = random.Random(f"task {seed}")
    meanings = list(OPERATIONS) * (len(NAMES) // len(OPERATIONS))
    kinds = list(KINDS) * (len(NAMES) // len(KINDS))
    rng.shuffle(meanings)
    rng.shuffle(kinds)
    meaning, kind = dict(zip(NAMES, meanings, strict=True)), dict(zip(NAMES, kinds, strict=True))
    prior = {}
    for name in NAMES:
        right, wrong = KINDS[kind[name]]
        others = [op for op in OPERATIONS if op != meaning[name]]
        favourite = rng.choice(others)
        rest = (1 - right - wrong) / (len(others) - 1)
        prior[name] = {op: rest for op in OPERATIONS} | {meaning[name]: right, favourite: wrong}
    return Task(meaning, kind, prior)


def completion(operation: str, digits: str) -> str:
    """Return the text of a call of `operation`: its name and its result.

    >>> completion("reverse", "47190")
    'reverse 0 9 1 7 4'
    """
    return " ".join([operation, *OPERATIONS[operation](digits)])


def prompt(name: str, digits: str) -> list[dict[str, str]]:
    """Return the conversational prompt."""
    return [{"role": "user", "content": " ".join([name, *digits])}]


def calls(part: Part, per_name: int, seed: int) -> list[tuple[str, str]]:
    """Draw `per_name` different digit strings of `part` for each name, as (name, digits) in random order."""
    rng = random.Random(f"calls {part} {seed}")
    pool = strings(part)
    drawn = [(name, digits) for name in NAMES for digits in rng.sample(pool, per_name)]
    rng.shuffle(drawn)
    return drawn
