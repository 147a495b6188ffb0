"""Who answered and where pairs come from, for the run's summary."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from composer_plugins.report.run_folder import TeacherInfo
from composer_plugins.traces.schema import Pair, Replay
from composer_plugins.traces.store import read_stage


def teachers(replays: Path) -> list[TeacherInfo]:
    """Return one entry per teacher of a replays stage file."""
    found: dict[str, TeacherInfo] = {}
    for replay in read_stage(replays, Replay):
        info = found.setdefault(
            replay.teacher,
            TeacherInfo(
                name=replay.teacher,
                model=replay.model,
                weights_id=replay.weights_id,
                demonstration=replay.demonstration,
            ),
        )
        info.replays += 1
        info.failed += replay.error is not None
    return list(found.values())


def pairs_by_rule(pairs: Path) -> dict[str, int]:
    """Return how many pairs each rule gave."""
    return dict(Counter(pair.provenance.rule for pair in read_stage(pairs, Pair)))
