"""Stored answers: the file of an unfinished replay, read tolerantly and written durably."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from composer_plugins.errors import TraceError
from composer_plugins.traces.schema import Replay
from composer_plugins.traces.store import manifest_path, read_manifest, read_stage


def partial_path(output: Path) -> Path:
    """Return where the answers of an unfinished replay lie."""
    return output.with_name(output.name + ".partial.jsonl")


def is_good(found: Replay | None) -> bool:
    """True for an answer that need not be asked for again."""
    return found is not None and found.error is None


@contextmanager
def partial_file(output: Path) -> Iterator[BinaryIO]:
    """Open the partial file for reading and appending, for this process alone."""
    path = partial_path(output)
    with path.open("a+b") as file:
        _lock(file, path)
        yield file


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks; two runs at once are the user's to avoid
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise TraceError(
            f"{path} is in use: another replay is writing it. Wait for it, or choose another -o."
        ) from error


def load_answers(output: Path, partial: BinaryIO) -> tuple[dict[str, Replay], int]:
    """Return stored answers by request key (newest good one wins), and how many lines could not be read."""
    known: dict[str, Replay] = {}
    if output.exists():
        _refuse_other_stage(output)
        for found in read_stage(output, Replay, require_manifest=False):
            if found.request:
                known[found.request] = found
    partial.seek(0)
    data = partial.read()
    whole = data[: data.rfind(b"\n") + 1]
    dropped = int(len(whole) < len(data))
    if dropped:  # a line that was being written when the run was cut off
        partial.truncate(len(whole))
    decoder = msgspec.json.Decoder(Replay)
    for line in whole.splitlines():
        try:
            found = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            dropped += 1
            continue
        if found.request and (found.error is None or not is_good(known.get(found.request))):
            known[found.request] = found
    partial.seek(0, os.SEEK_END)
    return known, dropped


def _refuse_other_stage(output: Path) -> None:
    if manifest_path(output).exists() and (found := read_manifest(output).record) != "Replay":
        raise TraceError(f"{output} holds {found} records and would be overwritten: choose another name with -o.")


def append(file: BinaryIO, replays: list[Replay]) -> None:
    """Add answers to the partial file; on disk when this returns."""
    encoder = msgspec.json.Encoder()
    file.write(b"".join(encoder.encode(r) + b"\n" for r in replays))
    file.flush()
    os.fsync(file.fileno())
