"""`composer-rl replay`: teachers answer the recorded states again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    states: Annotated[Path, typer.Argument(help="States file written by `composer-rl hints`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Replays file to write.")] = Path("replays.jsonl"),
    teachers: Annotated[
        Path | None,
        typer.Option(help="YAML list of teachers; default: two local demonstration teachers (no server, no key)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N states.")] = None,
    errors_first: Annotated[
        bool, typer.Option("--errors-first", help="Start with the states whose recorded action failed.")
    ] = False,
    give_up_after: Annotated[int, typer.Option(min=1, help="Stop a teacher after N failures in a row.")] = 20,
) -> None:
    """Ask every teacher what it would have done at every state (data for channel 3, our own addition).

    Interrupt it whenever you like: the same command continues and asks only what has no good answer yet.
    Teachers see the messages and tools of a state, never the recorded action or the hint. States are sent as
    they were logged (no scrubber in this version), so an address that is not this machine is refused unless
    its teacher says `allow_unscrubbed: true`.

    Example: `composer-rl replay states.jsonl -o replays.jsonl --teachers teachers.yaml`
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from composer_plugins.teachers.config import build_teachers, default_path, read_teachers
    from composer_plugins.teachers.replay import replay as run

    configs = read_teachers(teachers or default_path())
    columns = (TextColumn("replay: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def step(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        report = run(
            states,
            build_teachers(configs),
            output,
            limit=limit,
            errors_first=errors_first,
            give_up_after=give_up_after,
            progress=step,
        )
    _print(report, output)


def _print(report, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="replays")
    for column in ("teacher", "weights", "wanted", "reused", "asked", "answered", "failed"):
        table.add_column(column, overflow="fold")
    for name, count in report.teachers.items():
        label = f"{name} (demonstration)" if count.demonstration else name
        failed = ", ".join(f"{n} {reason}" for reason, n in sorted(count.failed.items())) or "0"
        table.add_row(
            label, count.weights_id, *map(str, (count.wanted, count.reused, count.asked, count.answered)), failed
        )
    console.print(table)
    for line in independence(report):
        console.print(line, highlight=False, soft_wrap=True)
    if report.dropped:
        console.print(f"{report.dropped} unreadable line(s) of the interrupted run were dropped and asked again.")
    if report.stale:
        console.print(f"{report.stale} stored answer(s) belong to another configuration or state and were left out.")
    failed = sum(sum(count.failed.values()) for count in report.teachers.values())
    if failed:
        console.print(f"{failed} request(s) failed; the same command asks them again.")
    console.print(f"{report.written} replays of {report.states} states in {output}", highlight=False, soft_wrap=True)


def independence(report) -> list[str]:
    """Return, in plain words, which teachers are not independent votes."""
    groups: dict[str, list[str]] = {}
    for name, count in report.teachers.items():
        groups.setdefault(count.weights_id, []).append(name)
    lines = [
        f"{', '.join(names)} have the same weights ({weights}): they are not independent votes, `pairs` counts them "
        "as one voter."
        for weights, names in groups.items()
        if len(names) > 1
    ]
    if len(groups) == 1:
        lines.append(
            "There is one independent voter in all, so no majority is possible: add teachers with other weights, or "
            "see `composer-rl pairs --help` for --count-samples-as-votes (demonstration only)."
        )
    return lines
