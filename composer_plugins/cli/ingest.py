"""`composer-rl ingest`: agent logs to traces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ingest(
    logs: Annotated[list[Path], typer.Argument(help="Log files, or folders that are searched for logs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Traces file to write.")] = Path("traces.jsonl"),
) -> None:
    """Read agent logs into one traces file.

    The format is found by content, never by name. Every line is accounted for: used, or skipped by a
    named reason. Damaged lines (cut, glued, binary) are listed and never stop the run; a file of a folder
    that is no log is listed too. Steps that a second file repeats are kept but marked as copies.

    Examples:

    `composer-rl ingest ~/.claude/projects/my-project -o traces.jsonl`

    `composer-rl ingest session.jsonl other-session.jsonl`
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from composer_plugins.traces.ingest import find_logs
    from composer_plugins.traces.ingest import ingest as run

    total = sum(path.stat().st_size for path, _ in find_logs(logs))
    columns = (TextColumn("ingest: {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        report = run(logs, output, progress=lambda path, size: bar.update(task, advance=size, description=path.name))
    _print(report, output)


def _print(report, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    manifest = report.manifest
    table = Table("lines", "count", title=f"{report.files} log file(s)")
    table.add_row("read", str(manifest.read))
    table.add_row("used", str(manifest.used))
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped: {reason.replace('_', ' ')}", str(count))
    console.print(table)
    lines = [str(problem) for problem in report.ledger.problems[:20]]
    if len(report.ledger.problems) > 20:
        lines.append(f"... and {len(report.ledger.problems) - 20} more damaged places")
    lines += [f"not read, no known log format: {path}" for path in report.refused]
    if report.copied_steps:
        lines.append(f"{report.copied_steps} step(s) repeat an earlier file and are marked as not trainable.")
    if report.renamed:
        lines.append(f"{report.renamed} trace(s) share a session id with another file and were numbered (#2, ...).")
    lines.append(f"{report.traces} traces with {report.steps} steps in {output}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
