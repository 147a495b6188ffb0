"""`composer-rl stats`: what is in a traces file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def stats(
    traces: Annotated[Path, typer.Argument(help="Traces file written by `composer-rl ingest`.")],
    top: Annotated[int, typer.Option(min=1, help="Rows of the tool and error tables.")] = 20,
) -> None:
    """Show steps, calls per tool, how they ended, and which errors there are.

    `flagged` errors were marked by the log itself, `inferred` ones were found in the text of a result, and
    `human` ones are rejections, missing permissions and feedback typed at the prompt. These three are the
    error turns that hints are written for. `inexact` says for how many steps, and why, the recorded
    messages are not all that the model saw.

    Example: `composer-rl stats traces.jsonl`
    """
    from rich.console import Console
    from rich.progress import Progress

    from composer_plugins.traces.schema import Trace
    from composer_plugins.traces.stats import collect
    from composer_plugins.traces.store import read_manifest, read_stage

    with Progress(console=Console(stderr=True), transient=True) as bar:
        total = read_manifest(traces).written if traces.exists() else None
        found = collect(bar.track(read_stage(traces, Trace), total=total, description="stats"))
    console = Console()
    console.print(_overview(found))
    console.print(_tools(found, top))
    if found.error_classes:
        console.print(_errors(found, top))


def _overview(found):
    from rich.table import Table

    table = Table("what", "count", title="traces")
    table.add_row("traces", f"{found.traces} ({found.sub_agents} of sub-agents)")
    table.add_row("messages", str(found.messages))
    table.add_row("steps", f"{found.steps} ({found.steps_with_calls} with tool calls)")
    table.add_row("error turns", str(found.error_turns))
    table.add_row("exact history", f"{found.exact} steps")
    for reason, count in found.inexact.most_common():
        table.add_row(f"inexact: {reason.replace('_', ' ')}", f"{count} steps")
    for reason, count in found.not_trainable.most_common():
        table.add_row(f"not trainable: {reason.replace('_', ' ')}", f"{count} steps")
    for model, count in found.models.most_common():
        table.add_row(f"model {model}", f"{count} steps")
    return table


def _tools(found, top: int):
    from rich.table import Table

    from composer_plugins.traces.stats import OUTCOMES

    table = Table("tool", "calls", *OUTCOMES.values(), title="tool calls")
    ranked = sorted(found.tools.items(), key=lambda item: (-item[1].calls, item[0]))
    for name, tool in ranked[:top]:
        table.add_row(name, str(tool.calls), *(str(tool.statuses[s] or "") for s in OUTCOMES))
    if len(ranked) > top:
        table.add_row(f"{len(ranked) - top} more", str(sum(tool.calls for _, tool in ranked[top:])))
    table.add_section()
    table.add_row("all", str(found.calls), *(str(found.statuses[s] or "") for s in OUTCOMES))
    return table


def _errors(found, top: int):
    from rich.table import Table

    from composer_plugins.traces.stats import OUTCOMES

    table = Table("error class", "how found", "results", title="errors")
    for (error_class, status), count in found.error_classes.most_common(top):
        table.add_row(error_class, OUTCOMES[status], str(count))
    return table
