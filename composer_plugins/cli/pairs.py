"""`composer-rl pairs`: preferences from agreement and disagreement between teachers and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pairs(
    states: Annotated[Path, typer.Argument(help="States file written by `composer-rl hints`.")],
    replays: Annotated[Path, typer.Argument(help="Replays file written by `composer-rl replay`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Pairs file to write.")] = Path("pairs.jsonl"),
    min_votes: Annotated[int, typer.Option(min=1, help="Fewest votes that can be a majority.")] = 2,
    count_samples_as_votes: Annotated[
        bool,
        typer.Option(
            "--count-samples-as-votes",
            help="Count every sample as a vote, also those of the same weights. They are not independent: for "
            "demonstrations only, and every such pair says so.",
        ),
    ] = False,
    overrule_success: Annotated[
        bool, typer.Option("--overrule-success", help="A majority may also overrule a recorded action that worked.")
    ] = False,
    invalid_calls: Annotated[
        bool, typer.Option(help="Recorded success over a teacher's call that does not parse or names no known tool.")
    ] = True,
    recovered_errors: Annotated[
        bool,
        typer.Option(help="A failed call loses to the same tool's next success in the log (hindsight; see the docs)."),
    ] = False,
    recovery_window: Annotated[int, typer.Option(min=1, help="Steps within which a recovery must happen.")] = 3,
    max_similarity: Annotated[float, typer.Option(help="Leave out pairs more alike than this (0 to 1).")] = 0.95,
    max_action_tokens: Annotated[
        int | None, typer.Option(min=1, help="Leave out longer actions (never cut); needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model whose tokenizer counts the tokens.")] = None,
    calls_only: Annotated[
        bool, typer.Option("--calls-only", help="Take prose and thinking off both actions: prefer the calls alone.")
    ] = False,
) -> None:
    """Make preference pairs for channel 3 (replay_dpo, our own addition to the recipe).

    Actions are compared as parsed tool calls: name and canonical arguments. Teachers with the same weights cast
    one vote together. Nothing is dropped silently: the tables count every state and every candidate.

    Example: `composer-rl pairs states.jsonl replays.jsonl -o pairs.jsonl`
    """
    from composer_plugins.errors import ConfigError, TraceError
    from composer_plugins.preferences.pairs import PairOptions, PairStats, build_pairs
    from composer_plugins.traces.schema import Replay, State
    from composer_plugins.traces.store import Manifest, file_sha256, read_stage, write_stage

    if output.resolve() in (states.resolve(), replays.resolve()):
        raise ConfigError(f"The output {output} is one of the inputs: choose another name with -o.")
    rules = ["agreement", "disagreement"]
    rules += ["invalid_call"] * invalid_calls + ["recovered_error"] * recovered_errors
    options = PairOptions(
        rules=tuple(rules), min_votes=min_votes, count_samples_as_votes=count_samples_as_votes,
        overrule_success=overrule_success, max_similarity=max_similarity, max_action_tokens=max_action_tokens,
        calls_only=calls_only, recovery_window=recovery_window,
    )  # fmt: skip
    stats = PairStats()
    stream = build_pairs(
        read_stage(states, State), read_stage(replays, Replay), options, stats=stats,
        count_tokens=_token_counter(model, max_action_tokens),
    )  # fmt: skip
    found = list(stream)  # before anything is written: an unusable input must not replace an old output
    if stats.orphans and not stats.matched:
        raise TraceError(
            f"None of the {stats.orphans} replays in {replays} belongs to a state of {states}: they come from another "
            "states file. Run `composer-rl replay` on this one."
        )
    details = {"rules": dict(stats.rules), "filtered": dict(stats.filtered), "answers": dict(stats.answers)}
    manifest = Manifest(
        stage="pairs", record="Pair", written=0,
        inputs={str(path): file_sha256(path) for path in (states, replays)},
        options={"pairs": options, **details, "orphans": stats.orphans, "demonstration_pairs": stats.demonstration},
    )  # fmt: skip
    write_stage(output, found, manifest, counts=stats.counts())
    _print(stats, options, output)


def _token_counter(model: str | None, needed: int | None):
    if needed is None or model is None:
        return None
    from composer_plugins.models import load_tokenizer, render_action

    tokenizer = load_tokenizer(model)
    return lambda action: len(tokenizer.encode(render_action(action, thinking=True), add_special_tokens=False))


def _print(stats, options, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("rule", "pairs", title="pairs")
    for rule in options.rules:
        table.add_row(rule, str(stats.rules[rule]))
    table.add_row("total", str(sum(stats.rules.values())), style="bold")
    console.print(table)
    for title, counter in (
        ("states without a pair", stats.skipped),
        ("candidates left out", stats.filtered),
        ("teacher answers", +stats.answers),
    ):
        if counter:
            rows = Table("reason" if "answers" not in title else "kind", "count", title=title)
            for reason, number in sorted(counter.items(), key=lambda item: (-item[1], item[0])):
                rows.add_row(reason, str(number))
            console.print(rows)
    if stats.orphans:
        console.print(f"{plural(stats.orphans, 'replay')} of states that are not in this states file were left out.")
    if options.count_samples_as_votes:
        console.print(
            "Demonstration: samples of the same weights were counted as votes. They are not independent, so these "
            "pairs show the mechanism and are no evidence about which action is better."
        )
    elif stats.demonstration:
        console.print(f"{plural(stats.demonstration, 'pair')} rest on demonstration teachers (small local models).")
    console.print(
        f"{plural(sum(stats.rules.values()), 'pair')} from {stats.used} of {plural(stats.read, 'state')} in {output}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def plural(number: int, noun: str) -> str:
    """Return "1 pair", "2 pairs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
