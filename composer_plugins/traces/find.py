"""Which files are logs, and which reader knows the format of one: found by content, never by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from composer_plugins.errors import TraceError
from composer_plugins.plugins import PluginManager, get_plugin_manager
from composer_plugins.traces.base import TraceReader
from composer_plugins.traces.store import manifest_path

#: So many bytes of a file decide its format.
HEAD = 64 * 1024
#: First bytes of compressed files, and what unpacks them. (Codex packs its older rollouts as `.jsonl.zst`.)
PACKED = {
    b"\x28\xb5\x2f\xfd": "zstd -d", b"\x1f\x8b": "gunzip -k", b"PK\x03\x04": "unzip", b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\x00": "unxz -k",
}  # fmt: skip
_MANIFEST = manifest_path(Path("x")).name.removeprefix("x")


def find_reader(path: Path, *, manager: PluginManager | None = None) -> TraceReader:
    """Return the reader whose format the file has.

    Raises:
        TraceError: the file is missing, empty, binary or of a format that no reader knows.
    """
    head = _head(path)
    registry = (manager or get_plugin_manager()).trace_readers
    broken = ""
    for entry in registry:
        reader = entry.load()
        try:
            if reader.sniff(head):
                return reader
        except Exception as error:  # a plugin's bug must not keep other readers from their files
            broken += f" The reader {entry.name!r} failed on it ({type(error).__name__}: {error}): report that bug."
    packed = next((how for start, how in PACKED.items() if head.startswith(start)), None)
    if packed is not None:
        raise TraceError(f"{path} is compressed. Unpack it first, then pass what comes out: {packed} {path}")
    if head.startswith(b"PAR1"):
        raise TraceError(
            f"{path} is a Parquet file; logs and datasets are read as JSON. Convert it with `datasets`: "
            f"load_dataset('parquet', data_files='{path}', split='train').to_json('{path.stem}.jsonl')"
        )
    kind = "binary data" if _is_binary(head) else f"a file that starts with {head[:40]!r}"
    raise TraceError(
        f"{path} is of no known log format: found {kind}. Formats that can be read: "
        f"{', '.join(sorted(entry.name for entry in registry))}. Pass the agent's own session log "
        "(Claude Code: ~/.claude/projects/<project>/<session>.jsonl), or install a plugin that reads this format."
        f"{broken}"
    )


def find_log(path: Path, *, manager: PluginManager | None = None) -> tuple[TraceReader, Path | None]:
    """Return the reader of a file, and, when its log has several files, the one of them through which all are read.

    The readers of logs of several files are asked first: a part of such a log may show nothing when it stands alone,
    and what is read with its log must not be read or refused a second time.

    Raises:
        TraceError: see `find_reader`.
    """
    for entry in (manager or get_plugin_manager()).trace_readers:
        reader = entry.load()
        part_of = getattr(reader, "part_of", None)
        try:
            first = part_of(path) if part_of is not None else None
        except Exception:  # a plugin's bug must not keep other readers from their files
            continue
        if first is not None:
            return reader, first
    return find_reader(path, manager=manager), None


def stage_file(path: Path) -> bool:
    """True for the files that our own stages write, whose manifest is beside them, and for these manifests."""
    return manifest_path(path).is_file() or (
        path.name.endswith(_MANIFEST) and path.with_name(path.name.removesuffix(_MANIFEST)).is_file()
    )


def find_companion(path: Path, *, manager: PluginManager | None = None) -> str | None:
    """Return what a file is that is no log but belongs to one (one word), or None."""
    head = _head(path)
    for entry in (manager or get_plugin_manager()).trace_readers:
        companion = getattr(entry.load(), "companion", None)
        if companion is not None and (word := companion(head)):
            return word
    return None


def _head(path: Path) -> bytes:
    if not path.exists():
        raise TraceError(f"Expected an agent log at {path}: there is no such file. Check the path.")
    if not path.is_file():
        raise TraceError(f"Expected an agent log at {path}: it is not a regular file.")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if not head.strip():
        raise TraceError(f"{path} is empty: expected an agent log with at least one record.")
    return head


def _is_binary(head: bytes) -> bool:
    if b"\x00" in head:
        return True
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start < len(head) - 4  # a character cut by the end of the head is fine
    return False


def find_logs(paths: Iterable[Path]) -> list[tuple[Path, bool]]:
    """Return (file, named by the user) for every file in `paths`; folders are searched, hidden files skipped.

    Raises:
        TraceError: a path does not exist, or a folder has no files.
    """
    found: dict[Path, bool] = {}
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
            if not inside:
                raise TraceError(f"The folder {path} has no files in it: pass a log or a folder of logs.")
            for file in inside:
                found.setdefault(file, False)
        elif path.exists():
            found[path] = True
        else:
            raise TraceError(f"Expected an agent log at {path}: there is no such file or folder. Check the path.")
    return list(found.items())


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
