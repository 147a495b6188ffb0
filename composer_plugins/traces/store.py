"""Stage files: one JSON record a line, a manifest beside it, nothing half-written taken for whole.

`logs -> traces.jsonl -> states.jsonl -> replays.jsonl -> pairs.jsonl`. A stage file `x.jsonl` has a
manifest `x.jsonl.manifest.json` that is written last: what has no manifest is not finished.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from composer_plugins import __version__
from composer_plugins.errors import TraceError

T = TypeVar("T", bound=msgspec.Struct)


class Manifest(msgspec.Struct, kw_only=True):
    """What a stage consumed and produced: `read == used + sum(skipped.values())`.

    `read` counts input records, `used` those that led to output, `skipped` the rest by reason;
    `written` counts output lines. `inputs` maps each input file to its SHA-256. `scrubbed` names the rules that
    removed secrets from the records; None: nothing was removed.
    """

    stage: str
    record: str
    written: int
    read: int = 0
    used: int = 0
    skipped: dict[str, int] = msgspec.field(default_factory=dict)
    inputs: dict[str, str] = msgspec.field(default_factory=dict)
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    scrubbed: str | None = None
    version: str = __version__
    sha256: str = ""

    def check(self) -> None:
        """Raise `TraceError` unless every record read is used or skipped by a named reason."""
        accounted = self.used + sum(self.skipped.values())
        if self.read != accounted:
            raise TraceError(
                f"Stage {self.stage!r} read {self.read} records but accounts for {accounted} "
                f"(used {self.used}, skipped {self.skipped}). This is a bug: please report it with the input."
            )


def manifest_path(path: Path) -> Path:
    """Return where the manifest of stage file `path` lives."""
    return path.with_name(path.name + ".manifest.json")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_stage(
    path: Path,
    records: Iterable[msgspec.Struct],
    manifest: Manifest,
    *,
    counts: Counter | None = None,
    keep_earlier: bool = False,
) -> Manifest:
    """Write `records` to `path` and then the manifest, each through a temporary file and a rename.

    Args:
        path: the stage file; parents are created.
        records: streamed, one line each.
        manifest: completed in place with `written` and `sha256`; `counts`, when given, is read after the
            stream ends and supplies `read`, `used` and `skipped:<reason>` keys.
        keep_earlier: when the stream fails, leave an earlier result as it was and no part of a new one.
            Otherwise an earlier result does not pass for the failed stage's.

    Returns:
        The completed manifest.

    Raises:
        TraceError: the file cannot be written, or the counts do not add up.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if not keep_earlier:
            manifest_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error
    temporary = path.with_name(path.name + ".part")
    try:
        try:
            _write_lines(temporary, records, manifest)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", 0)):
                raise  # what the records do is not the output's fault
            raise _not_written(path, error) from error
        if counts is not None:
            manifest.read, manifest.used = counts["read"], counts["used"]
            manifest.skipped = {k.split(":", 1)[1]: v for k, v in sorted(counts.items()) if k.startswith("skipped:")}
        manifest.check()
    except BaseException:
        if keep_earlier:
            temporary.unlink(missing_ok=True)
        raise
    manifest_path(path).unlink(missing_ok=True)
    temporary.replace(path)
    write_manifest(path, manifest)
    return manifest


def _write_lines(path: Path, records: Iterable[msgspec.Struct], manifest: Manifest) -> None:
    encoder, digest, written = msgspec.json.Encoder(), hashlib.sha256(), 0
    try:
        file = path.open("wb")
    except OSError as error:
        raise _not_written(path, error) from error
    with file:
        for record in records:
            line = encoder.encode(record) + b"\n"
            file.write(line)
            digest.update(line)
            written += 1
        file.flush()
        os.fsync(file.fileno())
    manifest.written, manifest.sha256 = written, digest.hexdigest()


def _not_written(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"{path} cannot be written: {error.strerror or error}. Choose another output, or free space on its disk."
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of `path` atomically."""
    target = manifest_path(path)
    temporary = target.with_name(target.name + ".part")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    temporary.replace(target)


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of stage file `path`. Raises `TraceError` when the stage did not finish."""
    target = manifest_path(path)
    if not target.exists():
        raise TraceError(
            f"{path} has no manifest ({target.name}): the stage that writes it did not finish. Run it again."
        )
    try:
        return msgspec.json.decode(target.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise TraceError(f"{target} is not a manifest: {error}. Run the stage again.") from error


def read_stage(path: Path, record: type[T], *, require_manifest: bool = True) -> Iterator[T]:
    """Stream the records of a stage file.

    Args:
        path: the stage file.
        record: the type each line must decode to.
        require_manifest: refuse a file whose stage did not finish (default).

    Raises:
        TraceError: missing file, missing manifest, or a line that is not such a record (the message
            names the line).
    """
    if not path.exists():
        raise TraceError(f"Expected a {record.__name__} stage file at {path}: there is no such file.")
    expected = None
    if require_manifest:
        manifest = read_manifest(path)
        expected = manifest.written
        if manifest.record != record.__name__:
            raise TraceError(f"{path} holds {manifest.record} records, expected {record.__name__}: pass another file.")
    decoder, number = msgspec.json.Decoder(record), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except msgspec.DecodeError as error:
                raise TraceError(
                    f"{path}, line {number}: not a {record.__name__} record ({error}). "
                    "The file was edited or cut: run the stage that writes it again."
                ) from error
    if expected is not None and number != expected:
        raise TraceError(
            f"{path} has {number} records, but its manifest says {expected}: lines were lost or added. "
            "Run the stage that writes it again."
        )
