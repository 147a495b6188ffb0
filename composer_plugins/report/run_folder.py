"""The records of a run folder: what a host adapter writes and the report reads.

    run/
      metrics.jsonl      one JSON object per optimizer step, appended and flushed
      token_views.jsonl  one `TokenView` per line, appended and flushed
      recipe.yaml        the resolved recipe
      summary.json       one `RunSummary`, written last: without it the run is unfinished

`docs/reference/run_folder.md` describes every field. Torch-free: values are turned into numbers here.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import msgspec
import yaml

from composer_plugins.errors import ConfigError
from composer_plugins.traces.store import Manifest

METRICS, TOKEN_VIEWS, RECIPE, SUMMARY = "metrics.jsonl", "token_views.jsonl", "recipe.yaml", "summary.json"
#: Keys of a metrics line that are not metrics.
RESERVED = ("step", "time")


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base: keyword-only, defaults left out of the JSON, unknown keys of newer versions ignored."""


class ViewMessage(RunRecord):
    """One message of a token view's context, already shortened by the writer."""

    role: str
    content: str


class TokenView(RunRecord):
    """One hinted action, token by token: how far the hinted self-teacher was from the student.

    `tokens`, `divergence` and `mask` have one entry per token of the action. `divergence` is in nats:
    at least 0 for a full or top-k divergence, signed for the sampled log-ratio, null when not finite.
    `mask` is True where the token carries the KL (the error turn). `error` is the tool result that made
    this an error turn; `level` the signal level; `teacher` the kind of self-teacher.
    """

    step: int
    kind: Literal["recorded", "rollout", "feedback", "sibling"]
    state_id: str
    tokens: list[str]
    divergence: list[float | None]
    mask: list[bool]
    hint: str
    teacher: str
    level: str
    messages: list[ViewMessage] = msgspec.field(default_factory=list)
    action_turn: str = ""
    error: str | None = None
    error_class: str | None = None
    reward: float | None = None
    source_ref: str | None = None

    def check(self) -> None:
        """Raise `ConfigError` unless the three lists have one entry per token."""
        found = (len(self.tokens), len(self.divergence), len(self.mask))
        if len(set(found)) != 1:
            raise ConfigError(
                "A token view needs one divergence and one mask entry per token; found "
                "{} tokens, {} divergences, {} mask entries.".format(*found)
            )

    def mean_divergence(self) -> float:
        """Mean of |divergence| over the finite tokens inside the mask, in nats; 0 without any."""
        inside = [abs(d) for d, m in zip(self.divergence, self.mask, strict=True) if m and finite(d)]
        return sum(inside) / len(inside) if inside else 0.0


class ModelInfo(RunRecord):
    """What was trained: the reference as given, where it resolved to, and a hash of the weights."""

    reference: str
    source: str = ""
    sha256: str = ""
    parameters: int | None = None
    note: str = ""


class Check(RunRecord):
    """One promise of the run about itself, with what was found and what was expected, as text."""

    name: str
    passed: bool
    found: str = ""
    expected: str = ""


class StageCount(RunRecord):
    """What one data stage read, used, skipped (by reason) and wrote."""

    stage: str
    written: int
    read: int = 0
    used: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest) -> StageCount:
        """Return the counts of a stage file's manifest."""
        m = manifest
        return cls(stage=m.stage, written=m.written, read=m.read, used=m.used, skipped=dict(m.skipped))


class TeacherInfo(RunRecord):
    """One replay teacher. Teachers with the same `weights_id` are not independent votes."""

    name: str
    model: str = ""
    weights_id: str | None = None
    demonstration: bool = False
    replays: int = 0
    failed: int = 0


class RunSummary(RunRecord):
    """What the run says about itself when it ends.

    `started` is ISO 8601, `seconds` the wall-clock of the whole run. `sized_down` lists what was made
    smaller than a real run. `counts` are free totals (states, hints, replays, pairs, ...); `provenance`
    maps a channel to a sentence on where its data came from. `command` repeats the run.
    """

    name: str
    started: str = ""
    seconds: float | None = None
    host: str = ""
    host_version: str = ""
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    seed: int | None = None
    model: ModelInfo | None = None
    sized_down: list[str] = msgspec.field(default_factory=list)
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    stages: list[StageCount] = msgspec.field(default_factory=list)
    teachers: list[TeacherInfo] = msgspec.field(default_factory=list)
    pairs_by_rule: dict[str, int] = msgspec.field(default_factory=dict)
    provenance: dict[str, str] = msgspec.field(default_factory=dict)
    checks: list[Check] = msgspec.field(default_factory=list)
    warnings: list[str] = msgspec.field(default_factory=list)
    command: str = ""
    machine: str = ""


def finite(value: float | None) -> bool:
    """True for a number that is neither NaN nor infinite."""
    return value is not None and math.isfinite(value)


class RunWriter:
    """Writes a run folder. One process writes it (rank 0); every line is flushed when it is complete.

    Args:
        folder: the run folder; created with its parents.
        existing: what to do when `folder` already holds metrics: `refuse` (default), `append` to resume
            a run, or `replace`.

    Raises:
        ConfigError: the folder holds a run and `existing` is `refuse`.
    """

    def __init__(self, folder: Path, *, existing: Literal["refuse", "append", "replace"] = "refuse") -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / METRICS
        if existing == "refuse" and target.exists() and target.stat().st_size:
            raise ConfigError(
                f"{self.folder} already holds a run ({METRICS}). Choose another output folder, resume the run, "
                "or move the old one away."
            )
        if existing == "replace":
            for name in (METRICS, TOKEN_VIEWS, RECIPE, SUMMARY):
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / SUMMARY).unlink(missing_ok=True)  # a resumed run is unfinished again
        self._files: dict[str, IO[bytes]] = {}
        self._start = time.monotonic()

    def metrics(self, step: int, values: Mapping[str, Any], *, seconds: float | None = None) -> None:
        """Append one line for optimizer step `step`.

        Args:
            step: the optimizer step, counted from 1.
            values: metric name to a number, a one-element tensor or array, or None for "not measured in
                this step". NaN and infinities are kept, as the strings "NaN", "Infinity", "-Infinity".
            seconds: seconds since the run started; None: since this writer was made.

        Raises:
            ConfigError: a metric is called `step` or `time`, or its value is not a number.
        """
        line: dict[str, Any] = {"step": int(step), "time": seconds}
        if seconds is None:
            line["time"] = round(time.monotonic() - self._start, 3)
        for name, value in values.items():
            if name in RESERVED:
                raise ConfigError(
                    f"A metric cannot be called {name!r}: a metrics line has a key of that name. Rename it."
                )
            line[name] = _number(name, value)
        self._append(METRICS, json.dumps(line, allow_nan=False).encode())

    def token_view(self, view: TokenView) -> None:
        """Append one token view. Raises `ConfigError` when its lists differ in length."""
        view.check()
        try:
            line = msgspec.json.encode(view)
        except UnicodeEncodeError:  # half of a surrogate pair, from a log that was cut inside a character
            line = msgspec.json.encode(_without_surrogates(msgspec.to_builtins(view)))
        self._append(TOKEN_VIEWS, line)

    def recipe(self, recipe: Mapping[str, Any]) -> None:
        """Write the resolved recipe; values that YAML has no type for are written as text."""
        text = yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=100)
        write_atomic(self.folder / RECIPE, text.encode("utf-8", "backslashreplace"))

    def summary(self, summary: RunSummary) -> None:
        """Write the summary, last: it marks the run as finished."""
        plain = _without_surrogates(msgspec.to_builtins(summary))
        write_atomic(self.folder / SUMMARY, msgspec.json.format(msgspec.json.encode(plain), indent=2) + b"\n")

    def close(self) -> None:
        """Close the files; the writer can be used again and reopens them."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, line: bytes) -> None:
        file = self._files.get(name)
        if file is None:
            path = self.folder / name
            file = self._files[name] = path.open("ab+")
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed run left half a line: keep it apart from the next one
                    file.write(b"\n")
        file.write(line + b"\n")
        file.flush()


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file in the same folder and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(name: str, value: Any) -> float | int | str | None:
    if value is None or isinstance(value, int):
        return value if value is None else int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Metric {name!r} must be a number or None, found {type(value).__name__}.") from error
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(v) for v in value]
    return value
