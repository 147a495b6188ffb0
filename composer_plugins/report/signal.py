"""The signal report of a pairs file: the same tables for the terminal and for one self-contained HTML page.

The page loads nothing and runs no script; a content-security policy forbids both. Everything that comes from logs
is escaped by the template engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from composer_plugins import __version__
from composer_plugins.report import charts
from composer_plugins.report.charts import number
from composer_plugins.report.pages import environment

if TYPE_CHECKING:
    from composer_plugins.preferences.margin import Estimate, Margins
    from composer_plugins.preferences.signal import Signal

BINS = 24


@dataclass
class Block:
    """One table: title, what it says, columns (the first is text), rows; `shown` rows fit a terminal."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    shown: int = 12


@dataclass
class Bar:
    """One bin of a histogram: its range in nats and the share of the pairs in it, in percent of the highest bin."""

    low: float
    high: float
    height: float
    count: int


def tables(found: Signal) -> list[Block]:
    """Return the report as tables, in the order of reading; one without rows is left out."""
    blocks = [
        _pairs_per_trace(found),
        Block("Pairs by rule", ["rule", "pairs"], _counts(found.rules)),
        Block("States", ["what became of them", "states"], _counts(found.states)),
        Block("Candidates left out", ["filter", "candidates"], _counts(found.filtered)),
        _agreement(found),
        Block("By tool", ["tool", "chosen", "rejected"], [[t, str(c), str(r)] for t, c, r in found.tools]),
        Block("By error class", ["recorded outcome", "pairs"], [[n, str(c)] for n, c in found.error_classes]),
        _lengths(found),
        _votes(found),
        _guard(found),
        _cost(found),
        _margins(found.margins),
    ]
    return [block for block in blocks if block is not None and block.rows]


def render(found: Signal, *, name: str) -> str:
    """Return the report as HTML.

    Args:
        found: the report.
        name: what to call it, e.g. the path of the pairs file.
    """
    return (
        environment()
        .get_template("signal.html.jinja")
        .render(
            found=found,
            name=name,
            blocks=tables(found),
            facts=facts(found),
            histograms=histograms(found.margins),
            matrix=matrix(found),
            version=__version__,
        )
    )


def facts(found: Signal) -> list[tuple[str, str, str]]:
    """Return the headline numbers as (label, value, what it is compared with)."""
    cost = found.cost["total_usd"]
    known = bool(found.cost["by_teacher"])
    per_pair = found.cost["per_pair_usd"]
    shown = [
        ("Pairs", f"{found.pairs:,}", f"from {found.states['with pairs']:,} of {found.states['read']:,} states"),
        (
            "Traces with at least 5 pairs",
            f"{len(found.traces) - found.below_bar} of {len(found.traces)}",
            "the bar for a preference signal",
        ),
        (
            "Own-family share",
            f"{found.guard['share']:.0%}",
            "pairs with a teacher of the student's or the agent's family on a side",
        ),
        (
            "Cost",
            f"${number(cost, 3)}" if known else "not known",
            f"${number(per_pair, 2)} a pair" if per_pair is not None else "no prices for these teachers",
        ),
    ]
    if found.margins and (gap := found.margins.difference["per_token"]).mean is not None:
        shown.append(("Margin beyond shuffled", f"{gap.mean:+.3f}", "nats per token, the student on its own states"))
    return shown


def matrix(found: Signal) -> list[tuple[str, list[tuple[str, int | None, str]]]]:
    """Return the agreement matrix as rows of (text, shade 0 to 6 or None, hover text)."""
    cells = {(a, b): (same, both) for a, b, same, both in found.agreement}
    rows = []
    for one in found.names:
        row = []
        for other in found.names:
            same, both = cells.get((one, other)) or cells.get((other, one)) or (0, 0)
            if one == other or not both:
                row.append(("–", None, ""))
            else:
                row.append((f"{same / both:.0%}", round(6 * same / both), f"{same} of {both} states"))
        rows.append((one, row))
    return rows


def histograms(margins: Margins | None) -> list[dict[str, Any]]:
    """Return the margins of the pairs and of the control over the same bins."""
    if margins is None or not margins.values:
        return []
    groups = {
        "Pairs": [own for _, own, _ in margins.values],
        "Shuffled pairs (control)": [control for _, _, control in margins.values if control is not None],
    }
    every = [value for group in groups.values() for value in group]
    low, high = min(every), max(every)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / BINS
    found, counted = [], {title: [0] * BINS for title in groups}
    for title, values in groups.items():
        for value in values:
            counted[title][min(int((value - low) / width), BINS - 1)] += 1
    top = max(max(counts) for counts in counted.values())
    for title, counts in counted.items():
        bars = [Bar(low + i * width, low + (i + 1) * width, 100 * c / top, c) for i, c in enumerate(counts)]
        zero = 100 * (0 - low) / (high - low) if low < 0 < high else None
        ticks = [
            (100 * (tick - low) / (high - low), text)
            for tick, text in charts.nice_ticks(low, high)
            if low <= tick <= high
        ]
        found.append({"title": title, "bars": bars, "zero": zero, "ticks": ticks, "count": sum(counts)})
    return found


def _counts(counted: dict[str, int]) -> list[list[str]]:
    return [[name, f"{count:,}"] for name, count in counted.items()]


def _pairs_per_trace(found: Signal) -> Block:
    rows = [[trace, str(count), "" if count >= 5 else "below the bar"] for trace, count in found.traces]
    return Block("Pairs per trace", ["trace", "pairs", ""], rows, "The bar is 5 pairs a trace.")


def _agreement(found: Signal) -> Block | None:
    rows = [[one, *(text for text, _, _ in cells)] for one, cells in matrix(found)]
    note = "Share of the states on which both acted where both did the same."
    return Block("Agreement", ["", *found.names], rows, note) if len(found.names) > 1 else None


def _lengths(found: Signal) -> Block | None:
    if found.lengths is None:
        return None
    lengths = found.lengths
    columns = ["", *lengths.chosen]
    rows = [[name, *(number(v) for v in side.values())] for name, side in
            (("chosen", lengths.chosen), ("rejected", lengths.rejected))]  # fmt: skip
    note = f"Chosen minus rejected: {interval(lengths.difference, 1)} {lengths.unit}; {lengths.bias}."
    return Block(f"Lengths of the actions ({lengths.unit})", columns, rows, note)


def _votes(found: Signal) -> Block | None:
    rows = [[f"decided by {share} votes", str(count)] for share, count in found.votes["by_share"]]
    rows += [[f"answers: {kind}", str(count)] for kind, count in found.votes["answers"].items() if count]
    rows += [[f"estimated reliability of {who}", f"{value:.2f}"] for who, value in found.votes["reliability"].items()]
    return Block(f"Votes ({found.votes['vote']})", ["what", "number"], rows)


def _guard(found: Signal) -> Block:
    guard = found.guard
    rows = [[f"teacher {name}", family] for name, family in guard["families"].items()]
    rows += [[f"recorded agent: {name}", f"{count} states"] for name, count in guard["recorded_models"].items()]
    rows.append(["student", guard["student"] or "not named (--student of `pairs`)"])
    rows.append(["own-family teachers", guard["own_family"] or "not checked"])
    rows += [[f"answers of {name}", str(count)] for name, count in guard["own_family_answers"].items()]
    rows.append(["pairs with one on a side", f"{guard['pairs_with_own_family']} ({guard['share']:.0%})"])
    rows.append(["pairs with one on the chosen side", str(guard["pairs_with_own_family_on_the_chosen_side"])])
    return Block("Circularity guard", ["what", "found"], rows, shown=20)


def _cost(found: Signal) -> Block:
    rows = [[name, f"${value:.4f}"] for name, value in found.cost["by_teacher"].items()]
    if rows:
        rows.append(["all", f"${found.cost['total_usd']:.4f}"])
        rows.append(["for states with pairs", f"${found.cost['of_states_with_pairs_usd']:.4f}"])
    if found.cost["unpriced_answers"]:
        rows.append(["answers without a price", str(found.cost["unpriced_answers"])])
    return Block("Cost of the answers", ["teacher", "dollars"], rows)


def _margins(margins: Margins | None) -> Block | None:
    if margins is None:
        return None
    groups = (
        ("pairs", margins.pairs), ("shuffled pairs (control)", margins.control), ("difference", margins.difference),
    )  # fmt: skip
    rows = [
        [
            name,
            interval(group["sum"], 2),
            interval(group["per_token"], 4),
            _share(group["sum"]),
            str(group["sum"].count),
        ]
        for name, group in groups
    ]
    left = ", ".join(f"{count} {reason}" for reason, count in margins.left_out.items())
    note = "log pi(chosen) - log pi(rejected); mean and 95 % bootstrap interval over states. The control gives each "
    note += "state the two actions of another state's pair." + (f" Not measured: {left}." if left else "")
    return Block(
        f"Margins of {margins.student} (nats)", ["", "sum", "per token", "above 0", "pairs"], rows, note
    )  # fmt: skip


def interval(found: Estimate, digits: int) -> str:
    """Return "mean [low, high]"."""
    if found.mean is None:
        return "–"
    if found.low is None:
        return f"{found.mean:+.{digits}f} [too few states]"
    return f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


def _share(found: Estimate) -> str:
    return "–" if found.positive is None else f"{found.positive:.0%}"
