"""The suite's own rules: no contract disappears, deviations are strict, what is not offered is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from composer_plugins.conformance.base import Conformance, ConformanceError, contract, contracts_of

SUITE = """
import pytest
from composer_plugins.conformance.base import Conformance, contract

class Base(Conformance):
    @contract()
    def test_holds(self):
        assert True

    @contract("wings")
    def test_flies(self):
        assert False

    @pytest.mark.parametrize("n", [1, 2])
    @contract()
    def test_counts(self, n):
        assert n == 1

class TestIt(Base):
    {body}
{after}
"""


def run(tmp_path, body: str, after: str = "") -> tuple[subprocess.CompletedProcess, dict | None]:
    suite, report = tmp_path / "suite.py", tmp_path / "report.json"
    suite.write_text(SUITE.format(body=body, after=after))
    done = subprocess.run(
        [
            sys.executable, "-m", "composer_plugins.cli", "conformance", str(suite), "--report", str(report),
        ],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    return done, json.loads(report.read_text()) if report.exists() else None


def outcomes(report: dict) -> dict[str, str]:
    return {
        r["contract"] + (f"[{r['parameters']}]" if r["parameters"] else ""): r["outcome"] for r in report["results"]
    }


def test_each_outcome_is_told_apart(tmp_path):
    done, report = run(tmp_path, 'deviations = {"test_counts[2]": "two is one too many"}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(report) == {
        "test_holds": "passed", "test_flies": "not offered", "test_counts[1]": "passed", "test_counts[2]": "deviation",
    }  # fmt: skip
    assert "two is one too many" in done.stdout and "wings" in done.stdout


def test_a_contract_that_fails_is_not_conformant(tmp_path):
    done, report = run(tmp_path, "pass")
    assert done.returncode == 1 and outcomes(report)["test_counts[2]"] == "failed"
    assert "assert 2 == 1" in done.stdout


def test_a_deviation_that_holds_after_all_fails(tmp_path):
    done, report = run(tmp_path, 'deviations = {"test_counts": "never right"}')
    assert done.returncode == 1 and outcomes(report) == {
        "test_holds": "passed", "test_flies": "not offered", "test_counts[1]": "failed", "test_counts[2]": "deviation",
    }  # fmt: skip
    assert "holds after all" in done.stdout


@pytest.mark.parametrize(
    ("body", "after", "message"),
    [
        ("def test_holds(self): pass", "", "test_holds is a contract"),
        ("test_holds = None", "", "test_holds is a contract"),
        ("pass", "TestIt.test_counts = None", "test_counts is a contract"),
        ("__test__ = False", "", "__test__"),
        ('deviations = {"test_nothing": "x"}', "", "no contract"),
        ('deviations = {"test_holds": ""}', "", "no reason"),
        ('capabilities = {"wings"}; reasons = {"wings": "none"}', "", "take one out"),
    ],
)
def test_a_contract_cannot_be_taken_out(tmp_path, body, after, message):
    done, report = run(tmp_path, body, after)
    assert done.returncode == 2 and message in done.stdout and report is None


def test_why_something_is_not_offered_is_said(tmp_path):
    done, report = run(tmp_path, 'reasons = {"wings": "it is a fish"}; deviations = {"test_counts[2]": "x"}')
    reasons = {r["contract"]: r["reason"] for r in report["results"]}
    assert reasons["test_flies"] == "wings (it is a fish)" and "it is a fish" in done.stdout


@pytest.mark.parametrize("name", ["diloco", "torchft"])
def test_an_outer_loop_is_named_by_its_kind_or_its_plugin(name):
    from composer_plugins.conformance.runner import resolve_target

    assert resolve_target(name).endswith("composer_torchft/conformance.py")


def test_an_outer_loop_without_a_suite_is_a_clear_error(monkeypatch):
    from composer_plugins.conformance.runner import resolve_target
    from composer_plugins.errors import PluginError
    from composer_plugins.plugins import get_plugin_manager
    from composer_plugins.plugins.registry import Entry

    def attach():
        """Registered as an object, in a module beside which there is no suite."""

    monkeypatch.setitem(
        get_plugin_manager().outer_loops._entries, "bare", (Entry("bare", "no suite", attach), "acme:loops")
    )
    for name in ("bare", "loops"):
        with pytest.raises(PluginError, match="'bare' has no conformance suite"):
            resolve_target(name)


def test_a_suite_in_which_nothing_is_offered_is_not_conformant(tmp_path):
    done, _ = run(tmp_path, "pass", "for n in ('test_holds', 'test_counts'): pass")
    assert done.returncode == 1
    done = subprocess.run(
        [sys.executable, "-m", "composer_plugins.cli", "conformance", str(tmp_path / "suite.py"), "-k", "flies"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and "No contract held" in done.stdout


def test_a_replaced_contract_is_refused_at_once():
    class Base(Conformance):
        @contract()
        def test_one(self):
            pass

    assert set(contracts_of(Base)) == {"test_one"}
    with pytest.raises(ConformanceError, match="test_one"):
        type("Test", (Base,), {"test_one": lambda self: None})


@pytest.mark.parametrize("target", ["no_such_host", "./missing.py"])
def test_a_target_that_is_not_there_is_a_clear_error(target, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "composer_plugins.cli", "conformance", target],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2 and "Expected a host" in done.stderr and "Traceback" not in done.stderr


def test_a_report_of_another_kind_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "composer_plugins.cli", "conformance", "trl", "--report", "x.pdf"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 2 and ".json or .html" in done.stderr
