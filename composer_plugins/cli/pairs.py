"""`composer-rl pairs`: preferences from agreement and disagreement between teachers and the log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

VOTING, FILTERS, GUARD, OUTPUT = "Votes and rules", "Filters", "Circularity guard", "Output"


def pairs(
    states: Annotated[Path, typer.Argument(help="States file written by `composer-rl hints`.")],
    replays: Annotated[Path, typer.Argument(help="Replays file written by `composer-rl replay`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Pairs file to write.", rich_help_panel=OUTPUT)] = Path(
        "pairs.jsonl"
    ),
    trl: Annotated[
        Path | None,
        typer.Option(
            help="Also write a preference dataset for `datasets` and TRL's DPOTrainer: .parquet (calls as objects) or "
            ".jsonl (calls as text).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    vote: Annotated[
        str,
        typer.Option(
            help="majority: more than half of the voters; unanimous: all; weighted: by the reliability that their "
            "agreement shows.",
            rich_help_panel=VOTING,
        ),
    ] = "majority",
    min_votes: Annotated[int, typer.Option(min=1, help="Fewest votes for a decision.", rich_help_panel=VOTING)] = 2,
    min_confidence: Annotated[
        float, typer.Option(help="Lowest posterior of a weighted decision (0.5 to 1).", rich_help_panel=VOTING)
    ] = 0.75,
    count_samples_as_votes: Annotated[
        bool,
        typer.Option(
            "--count-samples-as-votes",
            help="Count every sample as a vote, also those of the same weights. They are not independent: for "
            "demonstrations only, and every such pair says so.",
            rich_help_panel=VOTING,
        ),
    ] = False,
    text_actions: Annotated[
        bool,
        typer.Option("--text-actions", help="Answers in words vote, win and lose too.", rich_help_panel=VOTING),
    ] = False,
    overrule_success: Annotated[
        bool,
        typer.Option(
            "--overrule-success",
            help="A decision may also overrule a recorded action that worked.",
            rich_help_panel=VOTING,
        ),
    ] = False,
    invalid_calls: Annotated[
        bool,
        typer.Option(
            help="Recorded success over a teacher's call that does not parse or names no known tool.",
            rich_help_panel=VOTING,
        ),
    ] = True,
    recovered_errors: Annotated[
        bool,
        typer.Option(
            help="A failed call loses to the same tool's next success in the log (hindsight; see the docs).",
            rich_help_panel=VOTING,
        ),
    ] = False,
    teacher_pairs: Annotated[
        bool,
        typer.Option(
            help="The teachers' decision wins over each dissenting teacher, where the log says nothing.",
            rich_help_panel=VOTING,
        ),
    ] = False,
    recovery_window: Annotated[
        int, typer.Option(min=1, help="Steps within which a recovery must happen.", rich_help_panel=VOTING)
    ] = 3,
    equality: Annotated[
        Path | None,
        typer.Option(help="TOML that changes when two actions are the same.", rich_help_panel=VOTING),
    ] = None,
    max_similarity: Annotated[
        float, typer.Option(help="Leave out pairs more alike than this (0 to 1).", rich_help_panel=FILTERS)
    ] = 0.95,
    max_length_ratio: Annotated[
        float | None,
        typer.Option(
            help="Leave out pairs of which one action is longer than this many times the other (tokens with --model, "
            "else characters).",
            rich_help_panel=FILTERS,
        ),
    ] = None,
    max_action_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out longer actions (never cut); needs --model.", rich_help_panel=FILTERS),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer counts the tokens.", rich_help_panel=FILTERS)
    ] = None,
    calls_only: Annotated[
        bool,
        typer.Option(
            "--calls-only",
            help="Take prose and thinking off both actions: prefer the calls alone.",
            rich_help_panel=FILTERS,
        ),
    ] = False,
    student: Annotated[
        str | None, typer.Option(help="The model that will be trained on the pairs.", rich_help_panel=GUARD)
    ] = None,
    recorded_model: Annotated[
        str | None,
        typer.Option(help="The recorded agent's model, where the log names none.", rich_help_panel=GUARD),
    ] = None,
    own_family: Annotated[
        str,
        typer.Option(
            help="Teachers of the student's or the recorded agent's own model family: flag, exclude or allow.",
            rich_help_panel=GUARD,
        ),
    ] = "flag",
    families: Annotated[
        Path | None, typer.Option(help="TOML with further model families.", rich_help_panel=GUARD)
    ] = None,
) -> None:
    """Make preference pairs for channel 3 (replay_dpo, our own addition to the recipe).

    Actions are compared by what they do: tool and canonical arguments, shell commands by their words, paths by their
    normal form. Teachers with the same weights cast one vote together. Nothing is dropped silently: the tables count
    every state and every candidate. `composer-rl signal` says what the pairs are worth.

    Example: `composer-rl pairs states.jsonl replays.jsonl -o pairs.jsonl --student Qwen/Qwen3-4B`
    """
    from composer_plugins.errors import ConfigError, TraceError
    from composer_plugins.preferences import PairOptions, PairStats, build_pairs
    from composer_plugins.preferences.equality import Equality
    from composer_plugins.preferences.export import check_suffix, export
    from composer_plugins.preferences.families import Families
    from composer_plugins.traces.schema import Replay, State
    from composer_plugins.traces.store import Manifest, file_sha256, read_manifest, read_stage, write_stage

    if output.resolve() in (states.resolve(), replays.resolve()):
        raise ConfigError(f"The output {output} is one of the inputs: choose another name with -o.")
    if trl is not None:
        check_suffix(trl)
        if trl.resolve() in (states.resolve(), replays.resolve(), output.resolve()):
            raise ConfigError(f"The dataset {trl} would replace another file of this command: choose another name.")
    rules = ["agreement", "disagreement"]
    rules += ["invalid_call"] * invalid_calls + ["recovered_error"] * recovered_errors + ["teachers"] * teacher_pairs
    options = PairOptions(
        rules=tuple(rules), vote=vote, min_votes=min_votes, min_confidence=min_confidence,
        count_samples_as_votes=count_samples_as_votes, text_actions=text_actions, overrule_success=overrule_success,
        max_similarity=max_similarity, max_length_ratio=max_length_ratio, max_action_tokens=max_action_tokens,
        calls_only=calls_only, recovery_window=recovery_window, own_family=own_family, student=student,
        recorded_model=recorded_model,
    )  # fmt: skip
    stats, tokenizer = PairStats(), _tokenizer(model)
    found = list(
        build_pairs(
            read_stage(states, State),
            read_stage(replays, Replay),
            options,
            stats=stats,
            count_tokens=_token_counter(tokenizer),
            equality=Equality(equality) if equality else None,
            families=Families(families) if families else None,
        )
    )  # whole before it is written: an unusable input must not replace an old output
    if stats.orphans and not stats.matched:
        raise TraceError(
            f"None of the {stats.orphans} replays in {replays} belongs to a state of {states}: they come from another "
            "states file. Run `composer-rl replay` on this one."
        )
    inputs = [path for path in (states, replays, equality, families) if path is not None]
    manifest = Manifest(
        stage="pairs", record="Pair", written=0, scrubbed=read_manifest(states).scrubbed,
        inputs={str(path): file_sha256(path) for path in inputs},
        options={"pairs": options, **_counted_with(model, tokenizer), **stats.details()},
    )  # fmt: skip
    write_stage(output, found, manifest, counts=stats.counts())
    _print(stats, options, output)
    if trl is not None and found:
        typer.echo(f"{plural(export(output, trl), 'row')} in {trl}")
    elif trl is not None:
        typer.echo(f"No pair, so {trl} was not written.")


def _tokenizer(model: str | None):
    if model is None:
        return None
    from composer_plugins.models import load_tokenizer

    return load_tokenizer(model)


def _token_counter(tokenizer):
    if tokenizer is None:
        return None
    from composer_plugins.models import render_action

    return lambda action: len(tokenizer.encode(render_action(action, thinking=True), add_special_tokens=False))


def _counted_with(model: str | None, tokenizer) -> dict:
    """What the manifest says about the tokenizer, so that a run with another one refuses the pairs."""
    if tokenizer is None:
        return {}
    from composer_plugins.models.tokenizer import tokenizer_fingerprint

    return {"tokenizer": {"model": model, "sha256": tokenizer_fingerprint(tokenizer, template=False)}}


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
    for line in notes(stats, options):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{plural(sum(stats.rules.values()), 'pair')} from {stats.used} of {plural(stats.read, 'state')} in {output}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def notes(stats, options) -> list[str]:
    """Return what a reader has to know beside the tables, in plain words."""
    lines, total = [], sum(stats.rules.values())
    if stats.orphans:
        lines.append(f"{plural(stats.orphans, 'replay')} of states that are not in this states file were left out.")
    if stats.reliability:
        shown = ", ".join(f"{voter} {value:.2f}" for voter, value in stats.reliability.items())
        lines.append(f"Estimated reliability (probability of naming the right action): {shown}.")
    if options.count_samples_as_votes:
        lines.append(
            "Demonstration: samples of the same weights were counted as votes. They are not independent, so these "
            "pairs show the mechanism and are no evidence about which action is better."
        )
    elif stats.demonstration:
        lines.append(f"{plural(stats.demonstration, 'pair')} rest on demonstration teachers (small local models).")
    if stats.own_family_answers:
        who = ", ".join(f"{name} ({stats.families[name]})" for name in sorted(stats.own_family_answers))
        if options.own_family == "exclude":
            number = sum(stats.own_family_answers.values())
            lines.append(
                f"Circularity guard: {plural(number, 'answer')} of {who} were excluded: the same model family."
            )
        else:
            share = f"{stats.own_family_pairs} of {plural(total, 'pair')}"
            lines.append(
                f"Circularity guard: {who} is of the student's or the recorded agent's own family and stands on a side "
                f"of {share}. `--own-family exclude` leaves its votes out."
            )
    if unknown := sorted(name for name, family in stats.families.items() if family == "unknown"):
        lines.append(f"Circularity guard: the model family of {', '.join(unknown)} is unknown (see --families).")
    return lines


def plural(number: int, noun: str) -> str:
    """Return "1 pair", "2 pairs"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
