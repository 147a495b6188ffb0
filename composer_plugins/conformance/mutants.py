"""Defects planted in the source that is shipped, one at a time: does the suite notice, and by the contract that names it?

Each mutant is one replacement in one file of a copy of the packages; the suite then runs on that copy in a process of its
own. A replacement that does not match the source exactly once is an error, so that a list of mutants cannot rot.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from composer_plugins.errors import ConfigError


@dataclass(frozen=True)
class Mutant:
    """`old` in `file` becomes `new`; the contract `caught_by` has to fail.

    Args:
        name: what the defect is. file: relative to the folder that holds the packages, `package/module.py`.
        caught_by: a contract, with its parameters in brackets.
        suite: `package/module.py::Class` whose contract it is.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str
    suite: str


def copy_packages(packages: Sequence[Path], folder: Path) -> None:
    """Copy packages side by side into a folder."""
    for package in packages:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def plant(mutant: Mutant, folder: Path) -> None:
    """Make the replacement in a folder of copied packages. Raises `ConfigError` when the source has changed."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ConfigError(
            f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times and not exactly once: rewrite the mutant "
            f"{mutant.name!r}."
        )
    path.write_text(text.replace(mutant.old, mutant.new))


def outcomes(
    folder: Path, suite: str, contract: str, *, environment: Mapping[str, str] | None = None, path: Sequence[str] = ()
) -> dict[str, str]:
    """Run one contract of a suite on the packages in `folder`; return outcome by contract with parameters.

    Args:
        contract: with or without parameters; all of its parameters run.
        environment: beside this process's. path: folders to import from, after `folder`.

    Raises:
        ConfigError: nothing ran; the message holds pytest's output.
    """
    report, settings = folder / "report.json", folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", str(settings), "--rootdir", str(folder),
            "-p", "composer_plugins.conformance.plugin", "-p", "no:cacheprovider", "--import-mode=importlib",
            "--conformance-json", str(report), f"{folder / suite}::{contract.split('[')[0]}",
        ],
        env={
            **os.environ, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1", **(environment or {}),
            "PYTHONPATH": os.pathsep.join([str(folder), *path]),
        },
        cwd=folder, capture_output=True, text=True, timeout=300,  # `-m` puts the working directory first
    )  # fmt: skip
    if not report.exists():
        raise ConfigError(f"{suite}::{contract} did not run:\n{done.stdout}{done.stderr}")
    results = json.loads(report.read_text())["results"]
    return {r["contract"] + (f"[{r['parameters']}]" if r["parameters"] else ""): r["outcome"] for r in results}
