"""Reads a run folder back. Damaged lines are left out, and each one is named in `Run.problems`."""

from __future__ import annotations

import heapq
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from composer_plugins.errors import ConfigError, TraceError
from composer_plugins.report.run_folder import (
    METRICS,
    RECIPE,
    RESERVED,
    SUMMARY,
    TOKEN_VIEWS,
    RunSummary,
    TokenView,
)

#: At most this many problems are spelled out per file; the rest are counted.
MAX_PROBLEMS = 8
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Metrics:
    """The curves. `series[name][i]` belongs to `steps[i]`: a number (maybe NaN or infinite: it was
    measured and was not finite) or None (not measured in that step). Steps ascend without repeats."""

    steps: list[int] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=dict)


@dataclass
class Run:
    """A run folder, read. `views` holds the most divergent token views of `views_total`."""

    folder: Path
    metrics: Metrics
    views: list[TokenView]
    views_total: int
    views_by_kind: dict[str, int]
    recipe: dict[str, Any] | None
    recipe_text: str | None
    summary: RunSummary | None
    problems: list[str]


def read_run(folder: Path, *, max_views: int = 40) -> Run:
    """Read a run folder.

    Args:
        folder: what `composer-rl train` wrote.
        max_views: how many token views to keep, the most divergent first (mean |divergence| in nats per
            token inside the mask; ties by step, state and line).

    Raises:
        TraceError: no such folder, or no line of `metrics.jsonl` can be used.
    """
    if not folder.is_dir():
        raise TraceError(
            f"Expected a run folder at {folder}: there is no such folder. "
            "Pass the folder that `composer-rl train` printed."
        )
    problems: list[str] = []
    metrics = read_metrics(folder / METRICS, problems)
    by_kind: Counter[str] = Counter()
    ranked = (
        ((-view.mean_divergence(), view.step, view.state_id, number), view)
        for number, view in _views(folder / TOKEN_VIEWS, problems, by_kind)
    )
    kept = heapq.nsmallest(max_views, ranked, key=lambda item: item[0])
    recipe, recipe_text = _recipe(folder / RECIPE, problems)
    return Run(
        folder=folder,
        metrics=metrics,
        views=[view for _, view in kept],
        views_total=by_kind.total(),
        views_by_kind=dict(sorted(by_kind.items())),
        recipe=recipe,
        recipe_text=recipe_text,
        summary=_summary(folder / SUMMARY, problems),
        problems=problems,
    )


def read_metrics(path: Path, problems: list[str]) -> Metrics:
    """Read `metrics.jsonl`; what is damaged is left out and said in `problems`.

    A step that was written twice (a resumed run) keeps the later value of each metric.

    Raises:
        TraceError: the file is missing, empty, or holds no usable line.
    """
    if not path.is_file():
        raise TraceError(
            f"Expected {path.name} in {path.parent}: there is no such file, so this is not a run folder, or the run "
            "stopped before its first step. Pass the folder that `composer-rl train` printed."
        )
    rows: dict[int, dict[str, float | None]] = {}
    seconds: dict[int, float | None] = {}
    names: dict[str, None] = {}
    repeated: set[int] = set()
    notes = _Notes(path.name, problems)
    for number, line, torn in _lines(path):
        parsed = _metrics_line(number, line, torn, notes)
        if parsed is None:
            continue
        step, time, values = parsed
        row = rows.setdefault(step, {})
        if any(name in row for name in values):
            repeated.add(step)
        row.update(values)
        names.update(dict.fromkeys(values))
        seconds[step] = time if time is not None else seconds.get(step)
    notes.close()
    if repeated:
        problems.append(
            f"{path.name}: {len(repeated)} steps were written more than once (first {min(repeated)}), as a resumed "
            "run does; the later values are shown."
        )
    if not rows:
        raise TraceError(
            f"{path} holds no usable line"
            + (f" ({problems[0]})" if problems else " (it is empty)")
            + ". The run stopped before its first step: run `composer-rl train` again."
        )
    steps = sorted(rows)
    series = {name: [rows[s].get(name) for s in steps] for name in names}
    return Metrics(steps=steps, seconds=[seconds[s] for s in steps], series=series)


def _metrics_line(number: int, line: bytes, torn: bool, notes: _Notes):
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        notes.damaged(number, torn, error)
        return None
    step = item.get("step") if isinstance(item, dict) else None
    if not (type(step) is int or (type(step) is float and step.is_integer())) or not 0 <= step < 2**53:
        notes.add(f"line {number} has no whole-number `step`; it is left out.")
        return None
    values: dict[str, float | None] = {}
    for name, value in item.items():
        if name in RESERVED:
            continue
        value = NON_FINITE.get(value, value) if isinstance(value, str) else value
        if value is not None and not isinstance(value, int | float):
            notes.add(
                f"line {number}: metric {name!r} is not a number ({type(value).__name__}); that value is left out."
            )
            continue
        values[name] = None if value is None else _as_float(value)
    time = item.get("time")
    return int(step), float(time) if isinstance(time, int | float) else None, values


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond float range
        return math.inf if value > 0 else -math.inf


def _views(path: Path, problems: list[str], by_kind: Counter[str]) -> Iterator[tuple[int, TokenView]]:
    if not path.is_file():
        return
    decoder, notes = msgspec.json.Decoder(TokenView), _Notes(path.name, problems)
    for number, line, torn in _lines(path):
        try:
            view = decoder.decode(line)
            view.check()
        except ConfigError as error:
            notes.add(f"line {number} is left out: {error}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            notes.damaged(number, torn, error)
        else:
            by_kind[view.kind] += 1
            yield number, view
    notes.close()


def _recipe(path: Path, problems: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    if not path.is_file():
        problems.append(f"{RECIPE} is missing: the recipe of this run is not known.")
        return None, None
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{RECIPE} is not valid YAML ({str(error).splitlines()[0]}); it is shown as it is.")
        return None, text
    return (data if isinstance(data, dict) else None), text


def _summary(path: Path, problems: list[str]) -> RunSummary | None:
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunSummary)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        problems.append(f"{SUMMARY} cannot be read ({error}); checks, model and counts are not shown.")
        return None


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (number from 1, line, torn): torn is True for a last line without its newline."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line, not line.endswith(b"\n")


class _Notes:
    """Problems of one file: the first few in words, the rest counted."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.name, self.problems, self.count = name, problems, 0

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.problems.append(f"{self.name}, {text}")

    def damaged(self, number: int, torn: bool, error: Exception) -> None:
        if torn:
            self.add(
                f"line {number} is cut off (the last line: the run is being written or was killed); it is left out."
            )
        else:
            self.add(f"line {number} is damaged ({error}); it is left out.")

    def close(self) -> None:
        if self.count > MAX_PROBLEMS:
            self.problems.append(f"{self.name}: {self.count - MAX_PROBLEMS} more lines with problems.")
