"""Runs a suite with pytest in a process of its own and returns what came out."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_plugins.errors import ConfigError, PluginError
from composer_plugins.plugins.registry import Entry


@dataclass
class Run:
    """Outcome of a suite: pytest's exit code, the report (None when nothing ran) and its output."""

    code: int
    report: dict[str, Any] | None
    output: str

    @property
    def held(self) -> bool:
        """Every contract that is offered held, and there was at least one."""
        return self.code == 0 and bool(self.report and self.report["counts"].get("passed"))


def resolve_target(target: str) -> str:
    """Return what pytest is to collect: a host's or outer loop's own conformance module, a test file, a module by name.

    An outer loop (`diloco`, or the name of the plugin that registers it, `torchft`) has its suite in the module
    `conformance` of the package it is registered from.

    Raises:
        PluginError: the host or outer loop has no conformance module. ConfigError: there is nothing of this name.
    """
    from composer_plugins.plugins import get_plugin_manager

    manager = get_plugin_manager()
    hosts, loops = manager.hosts, manager.outer_loops
    names = ", ".join(entry.name for entry in (*hosts, *loops))
    if target in hosts:
        module = getattr(hosts.get(target).load(), "conformance", None)
        if module is None:
            raise PluginError(f"The host {target!r} names no conformance module (attribute `conformance`).")
        return _file_of(module)
    for entry in loops:
        if target in (entry.name, loops.provenance(entry.name).split(":")[-1]):
            return _file_of(_beside(entry))
    path = Path(target.split("::")[0])
    if path.exists():
        return str(path.absolute()) + target[len(str(path)) :]
    try:
        return _file_of(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"Expected a host or outer loop ({names}), a test file or a module, found {target!r}: {error}."
        ) from error


def _beside(entry: Entry) -> str:
    """Return the module `conformance` of the package that holds an outer loop. Raises `PluginError` without one."""
    target = entry.target
    module = target.partition(":")[0] if isinstance(target, str) else target.__module__
    suite = f"{module.rpartition('.')[0]}.conformance".lstrip(".")
    try:
        _file_of(suite)
    except ImportError as error:
        raise PluginError(f"The outer loop {entry.name!r} has no conformance suite: expected {suite}.") from error
    return suite


def _file_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {module!r}")
    return spec.origin


def run(target: str, *, select: str | None = None, timeout: float = 3600.0) -> Run:
    """Run the contracts of `target` (see `resolve_target`).

    Args:
        select: pytest's `-k` expression. timeout: seconds for the whole run.

    Raises:
        ConfigError: no such target, or pytest is not installed. PluginError: the run took longer than `timeout`.
    """
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError("The conformance suite needs pytest: pip install 'composer-plugins[conformance]'.")
    collected = resolve_target(target)
    with tempfile.TemporaryDirectory() as folder:
        settings, report = Path(folder) / "pytest.ini", Path(folder) / "report.json"
        settings.write_text("[pytest]\nxfail_strict = true\n")  # and none of the settings of whoever calls
        command = [
            sys.executable, "-m", "pytest", "-c", str(settings), "-p", "composer_plugins.conformance.plugin",
            "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir", folder, "--conformance-json", str(report),
            "-q", "-ra", "--tb=short", collected, *(["-k", select] if select else []),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTEST_ADDOPTS": ""}
            )
        except subprocess.TimeoutExpired as error:
            raise PluginError(f"The conformance run of {target!r} took longer than {timeout:.0f} s.") from error
        return Run(
            done.returncode, json.loads(report.read_text()) if report.exists() else None, done.stdout + done.stderr
        )
