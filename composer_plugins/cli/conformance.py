"""`composer-rl conformance`: does an adapter, channel, reader, hint generator or outer loop keep its contracts?"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer


def conformance(
    target: Annotated[
        str, typer.Argument(help="A host or outer loop (`composer-rl plugins`), a module or a test file.")
    ],
    report: Annotated[Path | None, typer.Option(help="Write the outcomes: out.json or out.html.")] = None,
    select: Annotated[
        str | None, typer.Option("--select", "-k", help="Only contracts that match (pytest's -k).")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the whole run.")] = 3600.0,
) -> None:
    """Run the conformance suite of a host or of your own module, in a process of its own.

    Prints one row per contract: held, failed (with the reason), not offered, or a declared deviation. Exit code 0 when
    all that is offered held, 1 when a contract failed, 2 when nothing could be run.

    Example: `composer-rl conformance trl --report out.html`
    """
    from rich.console import Console

    from composer_plugins.conformance.runner import run
    from composer_plugins.errors import ConfigError

    if report is not None and report.suffix not in (".json", ".html"):
        raise ConfigError(f"--report writes .json or .html, found {report.name!r}.")
    console = Console(highlight=False)
    found = run(target, select=select, timeout=timeout)
    if not found.report or not found.report["results"]:
        console.print(found.output[-4000:], markup=False, soft_wrap=True)
        raise ConfigError(f"No contract of {target!r} could be run; pytest's output is above.")
    _print(console, found.report)
    if report is not None:
        _write(report, found.report, target)
        console.print(f"Written: {report}", markup=False, soft_wrap=True)
    if not found.held:
        console.print("Not conformant." if found.report["counts"].get("failed") else "No contract held.")
        raise typer.Exit(1)
    console.print("Conformant: every contract that is offered held.")


def by_contract(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per suite and contract: counts of outcomes, seconds, and the distinct reasons."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["suite"], result["contract"]].append(result)
    return [
        {
            "suite": suite,
            "contract": name.removeprefix("test_").replace("_", " "),
            "counts": Counter(r["outcome"] for r in group),
            "seconds": sum(r["seconds"] for r in group),
            "reasons": list(
                dict.fromkeys(
                    f"{r['parameters']}: {r['reason']}" if r["parameters"] and r["outcome"] == "failed" else r["reason"]
                    for r in group
                    if r["reason"]
                )
            ),
        }
        for (suite, name), group in groups.items()
    ]


STYLES = {"passed": "green", "failed": "bold red", "not offered": "dim", "deviation": "yellow"}


def _print(console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(", ".join(f"{k} {v}" for k, v in report["versions"].items()), markup=False, style="dim")
    for suite, capabilities in report["suites"].items():
        table = Table(title=f"{suite} offers: {', '.join(capabilities) or 'nothing declared'}", title_justify="left")
        table.add_column("contract")
        table.add_column("outcome", no_wrap=True)
        table.add_column("reason")
        for row in by_contract([r for r in report["results"] if r["suite"] == suite]):
            outcome = Text(", ").join(Text(f"{n} {name}", STYLES[name]) for name, n in row["counts"].items())
            table.add_row(Text(row["contract"]), outcome, Text("; ".join(row["reasons"])[:300]))
        console.print(table)
    console.print(", ".join(f"{n} {name}" for name, n in report["counts"].items()))


def _write(path: Path, report: dict[str, Any], target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({"target": target, **report}, indent=1) + "\n")
        return
    from composer_plugins.report.pages import environment

    template = environment().get_template("conformance.html.jinja")
    held = not report["counts"].get("failed") and bool(report["counts"].get("passed"))
    path.write_text(
        template.render(target=Path(target).name, report=report, rows=by_contract(report["results"]), held=held)
    )
