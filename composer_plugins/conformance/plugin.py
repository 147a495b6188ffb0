"""The pytest side: a header with versions, a check that no contract was taken out, and a report as JSON.

Load it with `-p composer_plugins.conformance.plugin`, as `composer-rl conformance` does.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from composer_plugins.conformance.base import Conformance, broken_promises, contracts_of

#: Packages whose versions belong to a report.
PACKAGES = ("composer-plugins", "torch", "transformers", "trl", "verl", "prime-rl", "torchft", "numpy", "pytest")


def versions() -> dict[str, str]:
    """Return the versions that a report is about; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-json", default=None, help="Write every contract's outcome to this file.")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(config.getoption("--conformance-json")), "composer-conformance-recorder")


def pytest_report_header() -> str:
    return "composer conformance: " + ", ".join(f"{name} {version}" for name, version in versions().items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse suites whose contracts were changed after the class was made; `-k` may still choose among them."""
    for cls in {item.cls for item in items if _is_suite(item)}:
        problems = broken_promises(cls)
        if problems:
            raise pytest.UsageError(f"{cls.__name__}: {' '.join(problems)}")


def _is_suite(item: pytest.Item) -> bool:
    return isinstance(getattr(item, "cls", None), type) and issubclass(item.cls, Conformance)


class Recorder:
    """Collects one record per contract and parameter set."""

    def __init__(self, path: str | None) -> None:
        self.path, self.records, self.suites = path, {}, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        if not _is_suite(item) or item.originalname not in contracts_of(item.cls):
            return report
        self.suites[item.cls.__name__] = sorted(map(str, item.cls.capabilities))
        record = self.records.setdefault(
            item.nodeid,
            {
                "suite": item.cls.__name__, "contract": item.originalname, "outcome": "passed", "reason": "", "seconds": 0.0,
                "parameters": item.name[len(item.originalname) :].strip("[]"),
            },
        )  # fmt: skip
        record["seconds"] += report.duration
        outcome, reason = _outcome(report)
        if outcome != "passed":
            record["outcome"], record["reason"] = outcome, reason
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.path is None:
            return
        records = [{**record, "seconds": round(record["seconds"], 3)} for record in self.records.values()]
        payload: dict[str, Any] = {
            "versions": versions(),
            "suites": self.suites,
            "counts": dict(Counter(record["outcome"] for record in records)),
            "results": records,
        }
        Path(self.path).write_text(json.dumps(payload, indent=1))


def _outcome(report: pytest.TestReport) -> tuple[str, str]:
    """Map pytest's outcome to ours: passed, failed, not offered, deviation."""
    if hasattr(report, "wasxfail"):
        if report.outcome == "skipped":
            return "deviation", report.wasxfail.removeprefix("deviation: ")
        return "failed", "a declared deviation that holds after all: take it out of `deviations`"
    if report.outcome == "skipped":
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return "not offered", text.removeprefix("Skipped: ").removeprefix("not offered: ")
    if report.outcome == "failed":
        return "failed", _last_error(report)
    return "passed", ""


def _last_error(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    if report.longreprtext.startswith("[XPASS(strict)]"):
        return "a declared deviation that holds after all: take it out of `deviations`"
    return (crash.message if crash is not None else report.longreprtext)[:2000]
