"""From a stream of states to a stream of states with hints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from composer_plugins.hints.base import HintGenerator
from composer_plugins.traces.schema import State


def add_hints(states: Iterable[State], generator: HintGenerator, counts: Counter | None = None) -> Iterator[State]:
    """Yield every state, with the generator's hint where its recorded action failed.

    Args:
        states: from `build_states` or a stage file.
        generator: writes the hints; states whose action did not fail are passed on as they are.
        counts: gets `failed`, `hinted` and `hint:<error class>`.
    """
    counts = Counter() if counts is None else counts
    for state in states:
        if state.status.failed:
            counts["failed"] += 1
            state.hint = generator.generate(state)
            if state.hint is not None:
                counts["hinted"] += 1
                counts[f"hint:{state.hint.error_class}"] += 1
        yield state
