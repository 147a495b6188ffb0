"""What a run says about itself: verdict, warnings, and whether each channel was alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from composer_plugins.report.catalogue import ACTIVITY, GROUPS
from composer_plugins.report.charts import number, short
from composer_plugins.report.reader import Run
from composer_plugins.report.run_folder import TeacherInfo, finite

#: What a recipe's `composer` section means when a weight is not written.
DEFAULT_WEIGHT = {"policy": 1.0, "sdpo": 0.0, "replay_dpo": 0.0}
_COUNTED = {"policy": "active tokens", "sdpo": "active tokens", "replay_dpo": "pairs"}


@dataclass(frozen=True)
class Channel:
    """One channel in this run. `state` is on, off, silent or unknown; `active` counts steps of `steps`."""

    key: str
    title: str
    origin: str
    weight: float | None
    state: str
    text: str
    provenance: str


def verdict(run: Run) -> tuple[str, str]:
    """Return (good | bad | unsure, sentence)."""
    if run.summary is None:
        return "unsure", "Unfinished: this run wrote no summary, so nothing was checked"
    checks = run.summary.checks
    failed = sum(not c.passed for c in checks)
    if not checks:
        return "unsure", "No self-checks were recorded"
    if failed:
        return "bad", f"{failed} of {len(checks)} self-checks failed"
    return "good", "The self-check passed" if len(checks) == 1 else f"All {len(checks)} self-checks passed"


def channels(run: Run) -> list[Channel]:
    """Return the three channels with their weights (from the recipe) and activity (from the metrics)."""
    return [_channel(run, group.key, group.title, group.origin) for group in GROUPS if group.key in ACTIVITY]


def _channel(run: Run, key: str, title: str, origin: str) -> Channel:
    weight = _weight(run, key)
    provenance = run.summary.provenance.get(key, "") if run.summary else ""
    values = [v for v in run.metrics.series.get(ACTIVITY[key], []) if finite(v)]
    norms = [v for v in run.metrics.series.get(f"{key}/grad_norm", []) if finite(v)]
    active = sum(v > 0 for v in values)
    if weight == 0:
        state, text = "off", "Off in this run (weight 0): not computed."
    elif not values:
        state, text = "unknown", f"Its activity was not logged ({ACTIVITY[key]})."
    elif not active:
        state, text = "silent", f"Contributed nothing in any of {len(values):,} steps."
    elif norms and not any(norms):
        state, text = "silent", f"Its gradient norm was 0 in every one of {len(norms):,} measured steps."
    else:
        state = "on"
        text = f"Active in {active:,} of {len(values):,} steps, {number(sum(values))} {_COUNTED[key]}."
    return Channel(key, title, origin, weight, state, text, provenance)


def _weight(run: Run, key: str) -> float | None:
    section = (run.recipe or {}).get("composer")
    if not isinstance(section, dict):
        return None
    channel = section.get(key) or {}
    weight = channel.get("weight", DEFAULT_WEIGHT[key]) if isinstance(channel, dict) else None
    return float(weight) if isinstance(weight, int | float) and not isinstance(weight, bool) else None


def warnings(run: Run) -> list[str]:
    """Return what a reader must not miss: the run's own warnings, silent channels, values that blew up."""
    found = list(run.summary.warnings) if run.summary else []
    for channel in channels(run):
        wanted = channel.weight is not None and channel.weight > 0
        said = any(channel.key in text for text in found)
        if channel.state == "silent" and not said and channel.weight != 0:
            found.append(f"Channel {channel.key} was silent. {channel.text}")
        elif channel.state == "unknown" and wanted and channel.key != "policy" and not said:
            found.append(
                f"Channel {channel.key} has weight {number(channel.weight)}, but nothing shows that it ran. "
                f"{channel.text}"
            )
    for name in ("loss", "grad_norm"):
        bad = [
            s
            for s, v in zip(run.metrics.steps, run.metrics.series.get(name, []), strict=False)
            if v is not None and not finite(v)
        ]
        if bad:
            found.append(f"{name} was not a finite number in {len(bad):,} steps (first: step {bad[0]:,}).")
    return found


def facts(run: Run) -> list[tuple[str, str, str]]:
    """Return the headline numbers as (label, value, small print)."""
    series, steps = run.metrics.series, run.metrics.steps
    rows = [("optimizer steps", f"{steps[-1]:,}", _pace(run))]
    reward = [(s, v) for s, v in zip(steps, series.get("reward", []), strict=False) if finite(v)]
    if len(reward) > 1:
        (a, first), (b, last) = reward[0], reward[-1]
        rows.append(("reward", f"{short(first)} → {short(last)}", f"step {a:,} → {b:,}"))
    elif reward:
        rows.append(("reward", short(reward[0][1]), f"step {reward[0][0]:,}"))
    every = "" if len(steps) == steps[-1] - steps[0] + 1 else ", logged steps only"
    for name, label in (("sdpo/hinted_turns", "hinted turns trained on"), ("replay_dpo/pairs", "pairs trained on")):
        values = [v for v in series.get(name, []) if finite(v)]
        if values:
            small = f"in {sum(v > 0 for v in values):,} of {len(steps):,} steps{every}"
            rows.append((label, number(sum(values)), small))
    return rows


def _pace(run: Run) -> str:
    timed = [(s, t) for s, t in zip(run.metrics.steps, run.metrics.seconds, strict=True) if finite(t)]
    logged = "" if len(run.metrics.steps) == run.metrics.steps[-1] else f"{len(run.metrics.steps):,} logged"
    if len(timed) < 2 or timed[-1][1] <= timed[0][1]:
        return logged
    pace = f"{short((timed[-1][1] - timed[0][1]) / (timed[-1][0] - timed[0][0]))} s per step on average"
    return f"{pace}, {logged}" if logged else pace


def independent_voters(teachers: list[TeacherInfo]) -> dict[str, Any]:
    """Return how many distinct weights stand behind the teachers, and whether any only demonstrates."""
    known = {t.weights_id for t in teachers if t.weights_id}
    unknown = [t for t in teachers if not t.weights_id]
    return {
        "teachers": len(teachers),
        "weights": len(known) + len(unknown),
        "shared": len(known) + len(unknown) < len(teachers),
        "demonstration": any(t.demonstration for t in teachers),
    }
