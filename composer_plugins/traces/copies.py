"""Steps and records that were seen before, found in little memory."""

from __future__ import annotations

from array import array
from collections import defaultdict
from hashlib import blake2b

import msgspec

from composer_plugins.traces.schema import Step, Trace

#: Provider call ids at least this long are unique everywhere; shorter ones ("call_1") are not.
_UNIQUE_ID = 20
_encode = msgspec.json.Encoder().encode


class Seen:
    """A set of 64-bit keys in about 10 bytes each: millions of log records are remembered in tens of MB.

    A Python set takes 75 bytes or more an entry. Keys are spread over short arrays that are searched in C; two
    different records get the same key with a probability of n² / 2⁶⁵ (3e-8 for a million).
    """

    def __init__(self) -> None:
        self._buckets: defaultdict[int, array] = defaultdict(lambda: array("Q"))

    def __contains__(self, key: int) -> bool:
        bucket = self._buckets.get(key & 0xFFFF)
        return bucket is not None and key in bucket

    def add(self, key: int) -> None:
        """Remember `key` (0 ≤ key < 2⁶⁴)."""
        if key not in self:
            self._buckets[key & 0xFFFF].append(key)


#: The keys of one step, with the step's place in `trace.steps`.
StepKeys = tuple[int, list[int]]


def step_keys(trace: Trace) -> list[StepKeys]:
    """Return the keys by which each step is known again, in the order of the actions.

    They are a hash (BLAKE2b, 64 bits) of everything up to and including the step, and one of each of its call ids that
    is long enough to be unique everywhere. They are the same in every process.
    """
    at = {step.action: index for index, step in enumerate(trace.steps)}
    keys: list[StepKeys] = []
    chain = b""
    for position, message in enumerate(trace.messages[: max(at, default=-1) + 1]):
        chain = blake2b(chain + _encode(message), digest_size=8).digest()
        if (index := at.get(position)) is not None:
            calls = [c.id.encode() for c in message.tool_calls if len(c.id) >= _UNIQUE_ID]
            keys.append((index, [_number(chain), *(_number(blake2b(i, digest_size=8).digest()) for i in calls)]))
    return keys


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "big")


class CopyDetector:
    """Finds steps that an earlier file has already: resumed, forked and checkpointed sessions copy them.

    A step is a copy when everything up to and including it was seen before, or when its call ids were.
    """

    def __init__(self) -> None:
        self._seen = Seen()

    def copied(self, keys: list[StepKeys]) -> list[int]:
        """Return the places in `trace.steps` of the steps seen before; remember all of them."""
        copied = [index for index, mine in keys if any([key in self._seen for key in mine])]
        for _, mine in keys:
            for key in mine:
                self._seen.add(key)
        return copied


def mark_copies(steps: list[Step], copied: list[int]) -> None:
    """Set `trainable` to false on copied steps; a reason that was there before stays."""
    for index in copied:
        step = steps[index]
        step.trainable, step.not_trainable_reason = False, step.not_trainable_reason or "copied"
