"""The same tensors through several hosts and the losses of others: loss, gradient norm, how far the gradients are apart.

Hosts live in environments of their own, so each is measured by itself and the results are put together afterwards. The
batch of a real language model is written once and read by all; `formulas` are the oracle's on that batch, in float64, and
`rounding` the same with the model in float32; `published` are the loss functions of two checkouts (`published.py` says how to
get them).

    P="python -m composer_plugins.conformance.parity"
    $P batch smollm2-135m-instruct -o batch.json
    $P measure formulas -o formulas.npz --batch batch.json
    $P measure rounding -o rounding.npz --batch batch.json
    $P measure published -o published.npz --sdpo path/to/SDPO --opsd path/to/OPSD
    $P measure trl -o trl.npz --batch batch.json                                   # in TRL's environment
    $P measure verl -o verl.npz --batch batch.json                                 # in verl's
    $P measure prime_rl -o prime_rl.npz --batch batch.json                         # in prime-rl's
    $P table trl.npz verl.npz prime_rl.npz formulas.npz rounding.npz published.npz --batch batch.json > docs/parity.md
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from composer_plugins.conformance.adapter import AdapterConformance
from composer_plugins.conformance.expected import expected
from composer_plugins.conformance.parity_cases import Case, cases
from composer_plugins.conformance.plugin import versions
from composer_plugins.conformance.problem import Layout, Problem
from composer_plugins.conformance.references import Reference
from composer_plugins.conformance.runner import resolve_target
from composer_plugins.errors import ComposerError, ConfigError


def suite_of(host: str) -> AdapterConformance:
    """Return the adapter suite of a host, a file or a module. Raises `ConfigError` when there is none."""
    path = Path(resolve_target(host))
    spec = importlib.util.spec_from_file_location(f"parity_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # processes of further ranks import it again by this name
    spec.loader.exec_module(module)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, AdapterConformance) and value.__module__ == spec.name:
            return value()
    raise ConfigError(f"{path} has no subclass of AdapterConformance.")


class Measurement:
    """Losses and gradients by case, and those of references by number; written as one .npz file."""

    def __init__(self, host: str) -> None:
        self.about: dict[str, Any] = {
            "host": host, "versions": versions(), "losses": {}, "norms": {}, "left_out": {}, "references": [], "surrogate": ""
        }  # fmt: skip
        self.arrays: dict[str, np.ndarray] = {}

    def host(self, suite: AdapterConformance, batch: Problem | None) -> None:
        """Run every case that the host offers."""
        self.about["surrogate"] = suite.surrogate
        for case in cases(batch):
            missing = [str(need) for need in case.needs if need not in suite.capabilities]
            if case.objective is not None and case.objective not in suite.objectives:
                missing.append(f"objective {case.objective}")
            if missing:
                self.about["left_out"][case.name] = ", ".join(missing)
                continue
            try:
                outcome = suite.evaluate(case.problem, case.composer, Layout((tuple(range(len(case.problem.rows))),)))
            except ComposerError as error:
                self.about["left_out"][case.name] = f"refused: {error}"
                continue
            self._keep(case.name, outcome.loss, outcome.gradient, outcome.norm)

    def formulas(self, batch: Problem, dtype: str) -> None:
        """The oracle on the batch: slopes in float64 NumPy, sent back through the model in `dtype`."""
        from composer_plugins.conformance.real_model import ModelScores

        for case in cases(batch):
            if case.problem is batch:
                scores = ModelScores(batch, dtype)
                found = expected(batch, case.composer, scores=scores)["total"]
                self._keep(case.name, found.loss, found.gradient, scores.norm)

    def references(self, references: Iterable[Reference]) -> None:
        """Run the losses of others."""
        problems = {case.name: case.problem for case in cases()}
        for number, reference in enumerate(references):
            loss, gradient = reference.run(problems[reference.case])
            self._keep(f"reference {number}", loss, gradient)
            self.about["references"].append([reference.case, reference.name, reference.differs])

    def _keep(self, name: str, loss: float, gradient: np.ndarray, norm: float | None = None) -> None:
        self.arrays[name], self.about["losses"][name] = gradient, loss
        self.about["norms"][name] = float(np.linalg.norm(gradient)) if norm is None else norm

    def write(self, path: Path) -> None:
        np.savez(path, about=np.array(json.dumps(self.about)), **self.arrays)


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["batch", "measure", "table"])
    parser.add_argument(
        "names", nargs="+", help="a model; a host, formulas, rounding or published; or the measured files"
    )
    parser.add_argument("-o", "--output", type=Path)
    for option in ("--batch", "--sdpo", "--opsd"):
        parser.add_argument(option, type=Path)
    options = parser.parse_args(arguments)
    if options.action != "table" and (options.output is None or len(options.names) != 1):
        parser.error(f"{options.action} takes one name and -o FILE")
    try:
        _run(options)
    except ComposerError as error:
        raise SystemExit(f"error: {error}") from error


def _run(options: argparse.Namespace) -> None:
    from composer_plugins.conformance.real_model import load_batch, make_batch, save_batch

    if options.action == "batch":
        save_batch(make_batch(options.names[0], off_policy=0.0), options.output)
        return
    batch = load_batch(options.batch) if options.batch else None
    if options.action == "table":
        from composer_plugins.conformance.parity_table import table

        print(table([Path(name) for name in options.names], batch), end="")
        return
    name = options.names[0]
    found = Measurement(name)
    if name == "published":
        _published(found, options)
    elif name in ("formulas", "rounding"):
        if batch is None:
            raise ConfigError(f"{name} is computed on a batch: add --batch batch.json.")
        found.formulas(batch, {"formulas": "float64", "rounding": "float32"}[name])
    else:
        suite = suite_of(name)
        found.host(suite, batch)
        found.references(suite.references())
    found.write(options.output)


def _published(found: Measurement, options: argparse.Namespace) -> None:
    from composer_plugins.conformance import published

    if options.sdpo is None or options.opsd is None:
        raise ConfigError("published needs --sdpo and --opsd, the two checkouts.")
    commits = {
        name: published.commit_of(path)[:12]
        for name, path in (("lasgroup/SDPO", options.sdpo), ("siyan-zhao/OPSD", options.opsd))
    }
    found.about["versions"] = {**commits, **found.about["versions"]}
    found.references([*published.sdpo_references(options.sdpo), *published.opsd_references(options.opsd)])


__all__ = ["Case", "Measurement", "cases", "main", "suite_of"]

if __name__ == "__main__":
    main()
