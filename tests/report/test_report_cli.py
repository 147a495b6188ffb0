"""`composer-rl report`: prints the path, opens a browser on request, and never shows a traceback."""

from __future__ import annotations

import subprocess
import sys
import webbrowser

import typer
from typer.testing import CliRunner

from composer_plugins.cli.report import report


def invoke(*args: str):
    app = typer.Typer()
    app.command("report")(report)
    return CliRunner().invoke(app, list(args))


def test_it_writes_the_report_and_prints_where(demo):
    folder = demo(steps=3, views=1)
    result = invoke(str(folder))
    assert result.exit_code == 0 and result.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_output_and_open(demo, tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    target = tmp_path / "new" / "r.html"
    assert invoke(str(demo(steps=2, views=0)), "-o", str(target), "--open").exit_code == 0
    assert target.is_file() and opened == [target.resolve().as_uri()]


def test_a_browser_that_does_not_start_is_no_failure(demo, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    result = invoke(str(demo(steps=2, views=0)), "--open")
    assert result.exit_code == 0 and "open the file above by hand" in result.stderr


def run_program(*args: str) -> subprocess.CompletedProcess:
    """Run the real entry point with this command only, so that no other command is needed."""
    code = "import composer_plugins.cli as c; c.COMMANDS = ('report',); c.main()"
    return subprocess.run([sys.executable, "-c", code, "report", *args], capture_output=True, text=True)


def test_bad_input_is_a_message_with_the_fix_and_exit_code_3(tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        result = run_program(str(folder))
        assert result.returncode == 3 and result.stdout == ""
        assert result.stderr.startswith("TraceError: ") and "Traceback" not in result.stderr
        assert "composer-rl train" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(tmp_path):
    text = " ".join(run_program("--help").stdout.split())
    assert "self-contained" in text and "Example" in text and "--open" in text
