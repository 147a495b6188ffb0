"""`composer-rl signal`: what a pairs file is worth, before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def signal(
    pairs: Annotated[Path, typer.Argument(help="Pairs file written by `composer-rl pairs`.")],
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Model to measure: its log-probability margins on the pairs and on shuffled pairs."),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Most pairs to measure (four forward passes each).")] = 200,
    max_length: Annotated[int, typer.Option(min=16, help="Longest context plus action in tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the choice, the shuffling and the intervals.")] = 0,
) -> None:
    """Report the signal in a pairs file (data for channel 3, our own addition to the recipe).

    Pairs per trace, agreement between teachers, tools and error classes, length bias, filters, the circularity guard,
    cost; with `--student` also whether that model's preferences depend on the states at all.

    Example: `composer-rl signal pairs.jsonl --student smollm2-135m-instruct --html signal.html`
    """
    import json

    from composer_plugins.errors import ConfigError
    from composer_plugins.preferences.signal import signal_of
    from composer_plugins.traces.schema import Pair
    from composer_plugins.traces.store import manifest_path, read_manifest, read_stage

    for output in (html, json_):
        if output is not None and output.resolve() in (pairs.resolve(), manifest_path(pairs).resolve()):
            raise ConfigError(f"The output {output} would replace the pairs: choose another name.")
    records = list(read_stage(pairs, Pair))
    margins, size = _measure(records, student, limit, max_length, seed) if student and records else (None, None)
    found = signal_of(records, read_manifest(pairs), margins=margins, size=size, seed=seed)
    if json_ is not None:
        _write(json_, (json.dumps(found.to_json(), indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    if html is not None:
        from composer_plugins.report.signal import render

        _write(html, render(found, name=str(pairs)).encode("utf-8", "replace"))
    _print(found)  # last: `| head` may end it
    for output in filter(None, (json_, html)):
        typer.echo(output)


def _measure(records, student: str, limit: int, max_length: int, seed: int):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from composer_plugins.models import load_tokenizer, render_action
    from composer_plugins.preferences.margin import measure

    columns = (TextColumn("margins"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("margins", total=None)
        margins = measure(
            records, student, limit=limit, max_length=max_length, seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    tokenizer = load_tokenizer(student)
    return margins, lambda action: len(tokenizer.encode(render_action(action, thinking=True), add_special_tokens=False))


def _write(path: Path, data: bytes) -> None:
    from composer_plugins.errors import ConfigError
    from composer_plugins.report.run_folder import write_atomic

    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}). Name another file.") from error


def _print(found) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from composer_plugins.report.signal import tables

    console = Console()
    for block in tables(found):
        table = Table(title=block.title, caption=block.note or None, title_justify="left", caption_justify="left")
        for number, column in enumerate(block.columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in block.rows[: block.shown]:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        if len(block.rows) > block.shown:
            console.print(f"... and {len(block.rows) - block.shown} more rows (all are in the JSON and the HTML page)")
    for line in found.warnings:
        console.print(f"Warning: {line}", style="bold", highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{found.pairs} pairs, {len(found.traces)} traces, {found.below_bar} of them below the bar of 5 pairs",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
