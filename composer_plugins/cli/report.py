"""`composer-rl report`: a run folder as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The run folder that `composer-rl train` wrote.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The HTML file to write [default: RUN/report.html].")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Draw a run: curves of every channel, error turns token by token, and where the data came from.

    One self-contained HTML file that needs no network: mail it, attach it, open it anywhere. It also works
    on a run that is still going (what is there is drawn, and the report says that it is unfinished).

    Example: `composer-rl report runs/quickstart --open`
    """
    from composer_plugins.report.html import write_report

    path = write_report(run, output)
    typer.echo(path)
    if open_:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            typer.echo("No browser could be started; open the file above by hand.", err=True)
