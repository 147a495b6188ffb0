"""The little of the shell that can be known without running it.

Two uses: what a recorded `cp`, `mv`, `rm` or `git rm` did to the files, and the answers to a few
read-only commands from the files in memory. Nothing here runs, expands or evaluates anything.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable, Mapping

from composer_plugins.envs.numbered import is_complete
from composer_plugins.envs.tool_errors import ToolError

_SPECIAL = set("|&;<>$`\n*?[]{}~\\()")
_LONGEST = 10_000
_LOOK_ONLY = {"cat", "cd", "echo", "file", "find", "grep", "head", "ls", "pwd", "rg", "tail", "tree", "wc", "which"}
_GIT_LOOK_ONLY = {"add", "blame", "branch", "diff", "log", "push", "remote", "rev-parse", "show", "status"}


def normalise(command: str) -> str:
    """Return `command` with each run of white space as one space: how recorded commands are compared."""
    return " ".join(command.split())


def split_chain(command: str) -> list[list[str]] | None:
    """Return the words of each command of an `a && b` chain, or None when the command is more than that."""
    parts = command.strip().split(" && ")
    if len(command) > _LONGEST or any(_SPECIAL & set(part) for part in parts):
        return None
    try:
        return [shlex.split(part) for part in parts]
    except ValueError:
        return None


def may_change_files(command: str) -> bool:
    """Return False only when every command of the chain is known to leave file contents alone."""
    chain = split_chain(command)
    if chain is None:
        return True
    return not all(
        words and (words[0] in _LOOK_ONLY or (words[0] == "git" and words[1:2] and words[1] in _GIT_LOOK_ONLY))
        for words in chain
    )


def apply_effects(command: str, files: dict[str, str], cwd: str) -> tuple[str, set[str]]:
    """Apply a recorded, successful command to `files` in place, as far as its effects are plain.

    Returns:
        The working directory afterwards, and the paths that were written or removed.
    """
    changed: set[str] = set()
    for words in split_chain(command) or []:
        if words and words[0] == "git" and words[1:2] in (["rm"], ["mv"]):
            words = words[1:]
        if not words:
            continue
        paths = [posixpath.normpath(posixpath.join(cwd, w)) for w in words[1:] if not w.startswith("-")]
        if words[0] == "cd" and len(paths) == 1:
            cwd = paths[0]
        elif words[0] == "rm":
            gone = {f for f in files for p in paths if f == p or f.startswith(p + "/")}
            changed |= gone
            for file in gone:
                del files[file]
        elif words[0] in ("cp", "mv") and len(paths) == 2 and paths[0] in files:
            changed |= _copy(files, *paths, into=words[-1].endswith("/"), move=words[0] == "mv")
    return cwd, changed


def _copy(files: dict[str, str], source: str, target: str, *, into: bool, move: bool) -> set[str]:
    if into or any(f.startswith(target + "/") for f in files):
        target = posixpath.join(target, posixpath.basename(source))
    files[target] = files[source]
    if move and target != source:
        del files[source]
    return {source, target} if move else {target}


def answer(command: str, files: Mapping[str, str], cwd: str, resolve: Callable[[str], str]) -> str | None:
    """Return the output of a read-only command that the files in memory can answer, or None.

    Understood: `pwd`, `ls [DIR]`, `cat FILE`, `head [-n N | -N] FILE`, `wc -l FILE`.

    Raises:
        ToolError: the command names a file that the session has never seen.
    """
    chain = split_chain(command)
    if chain is None or len(chain) != 1 or not chain[0]:
        return None
    match chain[0]:
        case ["pwd"]:
            return cwd
        case ["ls"]:
            return _listing(files, cwd)
        case ["ls", path] if not path.startswith("-"):
            return _listing(files, resolve(path))
        case ["cat", path] if not path.startswith("-"):
            return _content("cat", path, files, resolve)
        case ["head", path] if not path.startswith("-"):
            return _head(path, "10", files, resolve)
        case ["head", "-n", count, path]:
            return _head(path, count, files, resolve)
        case ["head", flag, path] if flag.startswith("-"):
            return _head(path, flag.removeprefix("-n").lstrip("-"), files, resolve)
        case ["wc", "-l", path] if not path.startswith("-"):
            text = _content("wc", path, files, resolve)
            return None if text is None else f"{text.count(chr(10)):8d} {path}"
    return None


def children(files: Mapping[str, str], directory: str) -> list[str]:
    """Return the names directly under `directory`, sorted; directories end in a slash."""
    prefix = directory.rstrip("/") + "/"
    rests = (file[len(prefix) :].partition("/") for file in files if file.startswith(prefix))
    return sorted({name + slash for name, slash, _ in rests if name})


def _listing(files: Mapping[str, str], path: str) -> str | None:
    if path in files:
        return path
    names = children(files, path)
    return "\n".join(name.rstrip("/") for name in names) if names else None


def _content(tool: str, path: str, files: Mapping[str, str], resolve: Callable[[str], str]) -> str | None:
    found = resolve(path)
    if found not in files:
        if children(files, found):
            raise ToolError(f"Exit code 1\n{tool}: {path}: Is a directory")
        raise ToolError(f"Exit code 1\n{tool}: {path}: No such file or directory")
    return files[found] if is_complete(files[found]) else None


def _head(path: str, count: str, files: Mapping[str, str], resolve: Callable[[str], str]) -> str | None:
    if not (count.isascii() and count.isdigit()) or len(count) > 9:
        return None
    text = _content("head", path, files, resolve)
    return None if text is None else "\n".join(text.split("\n")[: int(count)])
