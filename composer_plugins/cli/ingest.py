"""`composer-rl ingest`: agent logs to traces."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

#: So many files get a row of their own in the printed table; the manifest has them all.
_ROWS = 100
#: Bytes that are read in about the time that a process takes to start.
_A_PROCESS = 16_000_000
#: So many damaged places, and files that were not read, are printed.
_LISTED = 20


def ingest(
    logs: Annotated[list[Path], typer.Argument(help="Log files, or folders that are searched for logs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Traces file to write.")] = Path("traces.jsonl"),
    allow_damaged: Annotated[
        bool, typer.Option("--allow-damaged", help="Accept damage in files that you name: read what is whole.")
    ] = False,
    scrub: Annotated[
        bool, typer.Option("--scrub/--no-scrub", help="Replace keys, passwords, e-mail addresses and users' names.")
    ] = True,
    scrub_rules: Annotated[
        Path | None, typer.Option("--scrub-rules", help="TOML or YAML file: your own rules, and values to leave alone.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", min=1, help="Processes that read files. Default: one a core, 1 for few megabytes."
        ),
    ] = None,
) -> None:
    """Read agent logs into one traces file.

    The format is found by content, never by name. Every record is accounted for: used, or set aside for a named
    reason. In a folder, damaged lines (cut, glued, binary) are listed and never stop the run, and a file that is
    no log is listed too. A file that you name must be whole unless `--allow-damaged` is given. Steps that a
    second file repeats are kept but marked as copies.

    Secrets and personal data are replaced by stable placeholders before anything is written (docs/reference/scrubbing.md);
    `--no-scrub` keeps them, and `replay` then refuses the data.

    A folder is read by several processes, one file each at a time. What is written does not depend on their number.

    Examples:

    `composer-rl ingest ~/.claude/projects/my-project -o traces.jsonl`

    `composer-rl ingest session.jsonl other-session.jsonl`

    `composer-rl ingest still-running.jsonl --allow-damaged`
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from composer_plugins.cli.scrub import make_scrubber, print_scrubbed
    from composer_plugins.traces.ingest import find_logs
    from composer_plugins.traces.ingest import ingest as run

    scrubber = make_scrubber(scrub_rules) if scrub else None
    found = find_logs(logs)
    total = sum(path.stat().st_size for path, _ in found)
    columns = (TextColumn("ingest: {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        report = run(
            logs,
            output,
            progress=lambda path, size: bar.update(task, advance=size, description=_plain(path.name)),
            allow_damaged=allow_damaged,
            scrubber=scrubber,
            jobs=_jobs(len(found), total) if jobs is None else min(jobs, len(found)),
        )
    print_scrubbed(scrubber)
    _print(report, output)


def _jobs(files: int, size: int) -> int:
    """A process a usable core, but none without a file, or for a few megabytes that are read before it has started."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, files, size // _A_PROCESS))


def _print(report, output: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(report))
    lines = [str(problem) for problem in report.ledger.problems[:_LISTED]]
    if report.ledger.problems.total > _LISTED:
        lines.append(f"... and {report.ledger.problems.total - _LISTED} more places")
    if len(report.read_files) > _ROWS:
        lines.append(f"{len(report.read_files) - _ROWS} more files are in the totals; the manifest lists them all.")
    refused = [f"not read: {_why(message)}" for message in report.refused.values()]
    lines += refused[:_LISTED]
    if len(refused) > _LISTED:
        lines.append(f"... and {len(refused) - _LISTED} more files that were not read (all are in the manifest)")
    if report.companions:
        kinds = sorted(set(report.companions.values()))
        words = ", ".join(f"{list(report.companions.values()).count(k)} {k.replace('_', ' ')}" for k in kinds)
        lines.append(f"set aside, belong to a log and are none: {words}")
    if report.copied_steps:
        lines.append(f"{report.copied_steps} step(s) repeat an earlier file and are marked as not trainable.")
    if report.renamed:
        lines.append(f"{report.renamed} trace(s) share a session id with another file and were numbered (#2, ...).")
    lines.append(f"{report.traces} traces with {report.steps} steps in {output}")
    for line in lines:
        console.print(_plain(line), markup=False, highlight=False, soft_wrap=True)


def _table(report):
    from rich.markup import escape
    from rich.table import Table

    root = _root([file.path for file in report.read_files])
    table = Table(title=f"{report.files} log file(s)" + (f" in {escape(_plain(str(root)))}" if root else ""))
    for name, justify in (("file", "left"), ("format", "left"), ("read", "right"), ("used", "right"),
                          ("set aside", "left"), ("damaged", "right"), ("steps", "right")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "format")
    for file in report.read_files[:_ROWS]:
        name = file.path.relative_to(root) if root else file.path
        cells = (escape(_end(_plain(str(name)))), file.format, file.read, file.used, escape(_reasons(file.skipped)))
        table.add_row(*map(str, cells), str(file.damaged or ""), str(file.steps))
    manifest = report.manifest
    table.add_section()
    totals = ("total", "", manifest.read, manifest.used, escape(_reasons(manifest.skipped)))
    table.add_row(*map(str, totals), str(report.ledger.problems.damage or ""), str(report.steps))
    return table


def _root(paths: list[Path]) -> Path | None:
    """The folder that holds all of several files, so that the table has room."""
    parents = [set(path.parents) for path in paths]
    shared = set.intersection(*parents) if len(parents) > 1 else set()
    return max(shared, key=lambda folder: len(folder.parts)) if shared else None


def _why(refusal: str) -> str:
    """A refusal without the list of formats, which would stand in every line; but not without a bug of a reader."""
    return refusal if "report that bug" in refusal else refusal.partition(". Formats that can be read")[0]


def _reasons(skipped: dict[str, int]) -> str:
    if not skipped:
        return ""
    return f"{sum(skipped.values())}: " + ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in skipped.items())


def _plain(name: str) -> str:
    """A file name with nothing in it that a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _end(name: str, width: int = 40) -> str:
    """The end of a long path, which tells files apart; the manifest has all of it."""
    return name if len(name) <= width else "…" + name[1 - width :]
