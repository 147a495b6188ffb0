"""From `results.json` to the tables of README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.held_out.arms import ARMS
from benchmarks.held_out.measure import interval
from benchmarks.held_out.task import KINDS

START, END = "<!-- results: written by run.py -->", "<!-- end of results -->"
_HINTS = {
    "none": "no hint (the base model)",
    "informative": "hint names the right function",
    "uninformative": "hint says nothing",
    "random": "hint names a random function",
}


def percent(values: list[float], *, sign: bool = False) -> str:
    """Return "mean ± half-width" in per cent.

    >>> percent([0.5, 0.5])
    '50.0 ± 0.0'
    """
    mean, half = interval(values)
    return f"{100 * mean:{'+' if sign else ''}.1f} ± {100 * half:.1f}"


def verdict(results: dict[str, Any]) -> str:
    """Say whether there is something to distil: base between 10 and 70 %, and a hinted reader that is better."""
    base, lines = results["base"].values(), []
    for mode in ("greedy", "sampled"):
        plain = [b["none"][mode] for b in base]
        gain = [b["informative"][mode] - b["none"][mode] for b in base]
        mean, half = interval(gain)
        met = 0.1 <= interval(plain)[0] <= 0.7 and mean > half
        lines.append(f"{mode}: base {percent(plain)} %, the hint adds {percent(gain, sign=True)} points "
                     f"({'condition met' if met else 'CONDITION NOT MET'})")  # fmt: skip
    return "Base between 10 and 70 %, and the hint raises the self-teacher: " + "; ".join(lines) + "."


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]


def render(results: dict[str, Any]) -> str:
    """Return the result section in Markdown: base and hints, arms, differences to GRPO, learning curve."""
    seeds, runs, base = results["seeds"], results["runs"], results["base"]
    spread = f"mean ± half-width of the 95 % t-interval over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]})"
    made_with = ", ".join(f"{name} {found}" for name, found in results["versions"].items())
    lines = [f"Held-out exact match in %, {spread}.", "",
             f"{made_with}. The command took {results['seconds'] / 60:.0f} minutes.", ""]  # fmt: skip

    lines += ["**Before training: what the hint is worth**", ""]
    rows = [[text] + [percent([base[s][key][m] for s in base]) for m in ("greedy", "sampled")]
            for key, text in _HINTS.items()]  # fmt: skip
    lines += [*_table(["base model reads", "greedy", "sampled, T = 1"], rows), "", verdict(results), ""]

    def values(arm: str, key: str) -> list[float]:
        return [runs[arm][s]["final"][key] for s in base]

    lines += [f"**After {results['rollouts']} rollouts in {results['settings']['training']['steps']} steps**", ""]
    columns = ["greedy", "sampled", *(f"sampled/{kind}" for kind in KINDS)]
    head = ["arm", "greedy", "sampled, T = 1", *(f"sampled, {kind} names" for kind in KINDS)]
    lines += [*_table(head, [[ARMS[a].label, *(percent(values(a, c)) for c in columns)] for a in runs]), ""]

    lines += ["**Paired difference to GRPO, in points**", ""]
    rows = [
        [ARMS[arm].label]
        + [percent([x - y for x, y in zip(values(arm, c), values("grpo", c), strict=True)], sign=True)
           for c in ("greedy", "sampled")]
        for arm in runs if arm != "grpo"
    ]  # fmt: skip
    lines += [*_table(["arm", "greedy", "sampled, T = 1"], rows), ""]

    lines += ["**On the way: sampled, T = 1, after a share of the steps**", ""]
    trained = [arm for arm in runs if runs[arm][next(iter(base))]["curve"]]
    steps = list(runs[trained[0]][next(iter(base))]["curve"])
    rows = [
        [ARMS[a].label, *(percent([runs[a][s]["curve"][k]["sampled"] for s in base]) for k in steps)] for a in trained
    ]
    lines += _table(["arm", *(f"step {k}" for k in steps)], rows)
    return "\n".join(lines) + "\n"


def write_section(readme: Path, section: str) -> None:
    """Put `section` between the two markers of `readme`. Raises `ValueError` when they are not there."""
    before, start, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"Expected the lines {START!r} and {END!r} in {readme}: put them back.")
    readme.write_text(f"{before}{START}\n{section}{END}{after}")
