"""`composer-rl validate`: what a file is, and everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class Finding:
    """What one file is, its problems (each a sentence with the fix), and remarks that are no problem."""

    path: Path
    what: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def validate(
    files: Annotated[list[Path], typer.Argument(help="Recipes, teachers files or stage files.", show_default=False)],
) -> None:
    """Say what each file is and everything that is wrong with it; exit code 2 when something is.

    A recipe is checked against the `composer` schema and by the host that its `host:` key names; a teachers file
    for unknown keys, literal keys and destinations; a stage file for its manifest, its hash and every record.
    Nothing is trained, loaded or contacted.

    Example: `composer-rl validate recipes/trl/quickstart.yaml teachers.yaml states.jsonl`
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    bad = 0
    for path in files:
        finding = examine(path)
        bad += bool(finding.problems)
        console.print(f"{path}: {finding.what}: {'problems' if finding.problems else 'ok'}", markup=False)
        for line in [*finding.problems, *(f"note: {note}" for note in finding.notes)]:
            console.print(f"  - {line}", markup=False)
    if bad:
        raise typer.Exit(2)


def examine(path: Path) -> Finding:
    """Return what a file is and what is wrong with it; never raises for bad input."""
    from composer_plugins.config import read_yaml
    from composer_plugins.errors import ComposerError
    from composer_plugins.hosts import host_by_suffix
    from composer_plugins.traces.store import manifest_path

    if not path.is_file():
        return Finding(path, "not a file", [f"There is no file at {path}. Check the path."])
    if path.suffix == ".jsonl" or manifest_path(path).exists():
        return _stage(path)
    if host := host_by_suffix(path):
        return _by_host(Finding(path, f"recipe for {host}"), host)
    if path.suffix not in (".yaml", ".yml"):
        return Finding(
            path, "unknown", ["Expected a recipe (.yaml, prime-rl's .toml), a teachers file or a stage file (.jsonl)."]
        )
    try:
        data = read_yaml(path)
    except ComposerError as error:
        return Finding(path, "unreadable YAML", [str(error)])
    if "teachers" in data:
        return _teachers(path, data)
    if "composer" in data or "host" in data:
        return _recipe(path, data)
    keys = ", ".join(map(str, data)) or "none"
    return Finding(
        path, "unknown", [f"Expected a key `composer` or `host` (recipe) or `teachers` (teachers file), found: {keys}."]
    )


def _recipe(path: Path, data: dict) -> Finding:
    from composer_plugins.config import parse_section
    from composer_plugins.errors import ComposerError

    host = data.get("host")
    finding = Finding(path, f"recipe for {host}" if isinstance(host, str) else "recipe")
    section = data.get("composer")
    try:
        if section is not None and not isinstance(section, dict):
            finding.problems.append(f"`composer` must be a mapping, found {type(section).__name__}.")
        else:
            parse_section(section)
    except ComposerError as error:
        finding.problems += str(error).splitlines()
    if host is None:
        finding.notes.append("no `host:` key, so only the `composer` section was checked.")
        return finding
    if not isinstance(host, str):
        finding.problems.append(f"`host` must be a name, found {type(host).__name__}.")
        return finding
    return _by_host(finding, host)


def _by_host(finding: Finding, host: str) -> Finding:
    """Add what the host itself says about the recipe."""
    from composer_plugins.errors import ComposerError
    from composer_plugins.plugins import get_plugin_manager

    try:
        found = get_plugin_manager().hosts.get(host).load().validate(finding.path)
    except ComposerError as error:
        found = str(error).splitlines()
    except ImportError as error:
        found = [
            f"The host {host} is not installed: {error}. Install it, e.g. `pip install 'composer-plugins[{host}]'`."
        ]
    finding.problems += [line for line in found if line not in finding.problems]
    return finding


def _teachers(path: Path, data: dict) -> Finding:
    import os

    from composer_plugins.errors import ComposerError
    from composer_plugins.teachers.config import parse_teachers

    try:
        configs = parse_teachers(data, where=str(path))
    except ComposerError as error:
        return Finding(path, "teachers file", str(error).splitlines())
    names = ", ".join(f"{config.name} ({config.kind})" for config in configs)
    finding = Finding(path, f"teachers file: {names}")
    finding.problems = [problem for config in configs for problem in config.problems()]
    for config in configs:
        variable = getattr(config, "api_key_env", None)
        if variable and not os.environ.get(variable):
            finding.notes.append(f"teacher {config.name!r}: the environment variable {variable} is not set here.")
    return finding


def _stage(path: Path) -> Finding:
    from composer_plugins.errors import ComposerError
    from composer_plugins.traces import schema
    from composer_plugins.traces.store import file_sha256, read_manifest, read_stage

    try:
        manifest = read_manifest(path)
    except ComposerError as error:
        return Finding(path, "stage file", [str(error)])
    finding = Finding(path, f"{manifest.stage} stage file, {manifest.written} {manifest.record} records")
    record = getattr(schema, manifest.record, None)
    if not (isinstance(record, type) and issubclass(record, schema.Record)):
        finding.problems.append(f"The manifest names the record type {manifest.record!r}, which this version lacks.")
        return finding
    try:
        manifest.check()
        for _ in read_stage(path, record):
            pass
        if file_sha256(path) != manifest.sha256:
            finding.problems.append(
                "The file was changed after its stage wrote it (SHA-256 differs): run the stage again."
            )
    except ComposerError as error:
        finding.problems.append(str(error))
    for name, sha256 in manifest.inputs.items():
        if Path(name).is_file() and file_sha256(Path(name)) != sha256:
            finding.notes.append(f"its input {name} has changed since; run the stage again to follow.")
    return finding
