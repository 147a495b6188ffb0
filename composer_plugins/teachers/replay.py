"""Replay: ask every teacher about every state, store each answer, resume where a run was cut off.

Answers are appended to `<output>.partial.jsonl`, which is flushed to disk after every batch, and become the
stage file with its manifest at the end. Each answer carries a hash of its request; a run starts by reading
what there is, and asks only for requests that have no good answer yet.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from composer_plugins.errors import TeacherError, TraceError
from composer_plugins.teachers.answers import append, is_good, load_answers, partial_file, partial_path
from composer_plugins.teachers.base import TRANSPORT, Teacher, TeacherStopped, reason_of
from composer_plugins.teachers.chat import request_key
from composer_plugins.traces.schema import Replay, State
from composer_plugins.traces.store import (
    Manifest,
    file_sha256,
    read_stage,
    write_stage,
)

#: Called as progress(teacher, done, total) when a teacher starts and after each of its batches.
Progress = Callable[[str, int, int], None]


@dataclass
class TeacherCount:
    """What became of one teacher's requests. `wanted == reused + answered + sum(failed) + unasked`."""

    model: str
    weights_id: str
    demonstration: bool
    fingerprint: str
    wanted: int = 0
    reused: int = 0
    answered: int = 0
    failed: Counter = field(default_factory=Counter)
    unasked: int = 0
    stopped: str | None = None

    @property
    def asked(self) -> int:
        """Requests made in this run."""
        return self.answered + sum(self.failed.values())


@dataclass
class ReplayReport:
    """What a replay did. `dropped` counts stored lines that could not be read, `stale` those not wanted now."""

    teachers: dict[str, TeacherCount]
    states: int
    written: int = 0
    dropped: int = 0
    stale: int = 0

    def broken(self) -> dict[str, str]:
        """Return the teachers without a single good answer, or stopped early, each with the reason."""
        bad = {}
        for name, count in self.teachers.items():
            if count.stopped:
                bad[name] = count.stopped
            elif count.wanted and not count.reused + count.answered:
                reasons = ", ".join(f"{n} {reason}" for reason, n in count.failed.most_common())
                bad[name] = f"all {count.wanted} requests failed ({reasons})"
        return bad


def replay(
    states_file: Path,
    teachers: list[Teacher],
    output: Path,
    *,
    limit: int | None = None,
    errors_first: bool = False,
    give_up_after: int = 20,
    progress: Progress | None = None,
) -> ReplayReport:
    """Ask all teachers about all states and write the replays stage file.

    Args:
        states_file: a finished states stage file.
        teachers: asked one after the other, each closed after its turn.
        output: the replays stage file; its unfinished answers lie beside it (`partial_path`).
        limit: only the first so many states.
        errors_first: states whose recorded action failed come first, so that `limit` keeps them.
        give_up_after: stop a teacher after so many failures in a row (a server that is down).
        progress: called before and during each teacher's work.

    Returns:
        The counts. Single failures are records with `error`, in the file, and asked again by the next run.

    Raises:
        TraceError: the states file is unusable, the output is another kind of file, or a second run is
            writing it.
        TeacherError: a teacher stopped or failed on everything. The answers of all others are kept in the
            partial file; the stage file is not written.
    """
    states = _read_states(states_file, limit, errors_first)
    if output.resolve() == states_file.resolve():
        raise TraceError(f"The output {output} is the states file itself: choose another name with -o.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial_file(output) as file:
        known, dropped = load_answers(output, file)
        report = ReplayReport({}, len(states), dropped=dropped)
        wanted: list[list[str]] = []
        for teacher in teachers:
            wanted.append(_run_teacher(teacher, states, known, file, report, give_up_after, progress))
            teacher.close()
        if not report.teachers:
            raise TeacherError("There is no teacher to ask: list at least one in the teachers file.")
        if broken := report.broken():
            lines = [f"- {name}: {why}" for name, why in broken.items()]
            raise TeacherError(
                "These teachers could not be used:\n"
                + "\n".join(lines)
                + f"\n{sum(r.error is None for r in known.values())} "
                f"good answers are kept in {partial_path(output).name}. Fix the cause, or remove the teacher from the "
                "file, and run the same command again: only what is missing is asked."
            )
        keys = [key for row in zip(*wanted, strict=True) for per_state in row for key in per_state]
        report.stale = len(set(known) - set(keys))
        _finish(output, states_file, states, [known[key] for key in keys], report)
        partial_path(output).unlink()
    return report


def _read_states(path: Path, limit: int | None, errors_first: bool) -> list[State]:
    states = list(itertools.islice(read_stage(path, State), None if errors_first else limit))
    if errors_first:
        states = sorted(states, key=lambda s: not s.status.failed)[:limit]
    if not states:
        raise TraceError(f"{path} holds no states: there is nothing to replay. Check the counts that `hints` printed.")
    if twice := [identity for identity, n in Counter(s.id for s in states).items() if n > 1]:
        raise TraceError(f"{path} holds the state id {twice[0]!r} more than once: run `composer-rl hints` again.")
    return states


def _run_teacher(teacher, states, known, file, report, give_up_after, progress) -> list[list[str]]:
    """Ask one teacher for what is missing; return its request keys, one list (over samples) per state."""
    if teacher.name in report.teachers:
        raise TeacherError(f"Two teachers are called {teacher.name!r}: names must be unique.")
    count = report.teachers[teacher.name] = TeacherCount(
        teacher.model, teacher.weights_id, teacher.demonstration, teacher.fingerprint
    )
    keys = [[request_key(teacher.fingerprint, state, n) for n in range(teacher.samples)] for state in states]
    jobs = [
        (sample, state, keys[number][sample])
        for sample in range(teacher.samples)
        for number, state in enumerate(states)
        if not is_good(known.get(keys[number][sample]))
    ]
    count.wanted = teacher.samples * len(states)
    count.reused = count.wanted - len(jobs)
    if progress:
        progress(teacher.name, count.reused, count.wanted)
    in_a_row = done = 0
    for sample, batch in _batches(jobs, teacher.batch_size):
        replays = _ask(teacher, [state for state, _ in batch], sample, count)
        key_of = {state.id: key for state, key in batch}
        for answered in replays:
            answered.request = key_of[answered.state_id]
            # The same request again, e.g. renamed weights: the answer stands, who gave it is what is so now.
            known[answered.request] = answered
            if answered.error is None:
                count.answered += 1
                in_a_row = 0
            else:
                count.failed[reason_of(answered.error)] += 1
                in_a_row += reason_of(answered.error) in TRANSPORT
        done += len(replays)
        append(file, replays)
        if progress:
            progress(teacher.name, count.reused + done, count.wanted)
        if count.stopped is None and in_a_row >= give_up_after:
            count.stopped = f"{in_a_row} failures in a row, the last: {replays[-1].error}"
        if count.stopped:
            break
    count.unasked = len(jobs) - done
    _relabel(teacher, known, keys)
    return keys


def _ask(teacher: Teacher, states: list[State], sample: int, count: TeacherCount) -> list[Replay]:
    try:
        replays = teacher.ask(states, sample=sample)
    except TeacherStopped as error:
        count.stopped = str(error)
        return error.replays
    if [r.state_id for r in replays] != [s.id for s in states]:
        raise TeacherError(
            f"The teacher {teacher.name!r} was asked about {len(states)} states and must return one Replay for each, "
            f"in order; it returned {len(replays)}. This is a bug in the teacher's plugin."
        )
    return replays


def _relabel(teacher: Teacher, known: dict[str, Replay], keys: list[list[str]]) -> None:
    """Give reused answers the identity that the configuration has now (`weights_id` may have been edited)."""
    for key in (key for per_state in keys for key in per_state):
        if (found := known.get(key)) is not None:
            found.weights_id, found.demonstration = teacher.weights_id, teacher.demonstration


def _batches(jobs: list, size: int) -> Iterator[tuple[int, list[tuple[State, str]]]]:
    """Yield (sample, [(state, key), ...]) with at most `size` states of one sample."""
    start = 0
    while start < len(jobs):
        sample = jobs[start][0]
        stop = start
        while stop < len(jobs) and stop - start < max(size, 1) and jobs[stop][0] == sample:
            stop += 1
        yield sample, [(state, key) for _, state, key in jobs[start:stop]]
        start = stop


def _finish(output: Path, states_file: Path, states: list[State], replays: list[Replay], report: ReplayReport) -> None:
    answered = {r.state_id for r in replays if r.error is None}
    manifest = Manifest(
        stage="replay",
        record="Replay",
        written=0,
        read=len(states),
        used=len(answered),
        skipped={"no_teacher_answered": len(states) - len(answered)} if len(answered) < len(states) else {},
        inputs={str(states_file): file_sha256(states_file)},
        options={"teachers": {name: msgspec.to_builtins(count) for name, count in report.teachers.items()}},
    )
    report.written = write_stage(output, replays, manifest).written
