"""`write_report`: a run folder as one self-contained HTML file.

The file loads nothing: styles and script are inline, a content-security policy forbids the rest, and only
our own script may run (by its hash). Everything that comes from logs is escaped by the template engine.
"""

from __future__ import annotations

import base64
import hashlib
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from composer_plugins import __version__
from composer_plugins.errors import ConfigError
from composer_plugins.report import catalogue, charts, health, tokens
from composer_plugins.report.pages import environment
from composer_plugins.report.reader import Run, read_run
from composer_plugins.report.run_folder import write_atomic

MAX_VIEWS, MAX_ROWS, OPEN_CHARTS = 40, 200, 8
_SECRET = re.compile(
    r"^(?P<key>\s*(?:-\s*)?[\"']?[\w.-]*(?:api_?key|secret|password|access_token|auth_token|hub_token|hf_token)[\"']?\s*:\s*)"
    r"(?!null\b|~|['\"]{2})(?P<value>\S.*)$",
    re.IGNORECASE | re.MULTILINE,
)


def write_report(run: Path, output: Path | None = None) -> Path:
    """Draw the run folder `run` into one HTML file.

    Args:
        run: a run folder (`metrics.jsonl`, and what there is of the other files).
        output: where to write; None: `report.html` inside the run folder. Replaced in one step at the
            end: on an error nothing is written and an older report stays.

    Returns:
        The path of the file. The same run folder gives the same bytes.

    Raises:
        TraceError: no run folder, or no usable metrics line in it.
        ConfigError: `output` cannot be written.
    """
    data = render(read_run(Path(run), max_views=MAX_VIEWS)).encode("utf-8", "replace")
    target = Path(output) if output is not None else Path(run) / "report.html"
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; name the file to write, for example {target / 'report.html'}.")
    try:
        write_atomic(target, data)
    except OSError as error:
        raise ConfigError(
            f"The report cannot be written to {target} ({error}). Name another file with `-o`."
        ) from error
    return target


def render(run: Run) -> str:
    """Return the report of `run` as HTML."""
    pages = environment(
        short=charts.short,
        millions=millions,
        when=when,
        duration=duration,
        split_lines=split_lines,
    )
    script = pages.get_template("script.js.jinja").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = pages.get_template("report.html.jinja")
    return template.render(**context(run), script=script, script_hash=digest, version=__version__)


def context(run: Run) -> dict[str, Any]:
    """Return everything the template shows, as plain values."""
    scale = tokens.scale_of(run.views)
    groups, chart_data = chart_groups(run)
    return {
        "run": run,
        "summary": run.summary,
        "name": run.summary.name if run.summary else run.folder.resolve().name,
        "verdict": health.verdict(run),
        "warnings": health.warnings(run),
        "channels": health.channels(run),
        "facts": health.facts(run),
        "groups": groups,
        "chart_data": chart_data,
        "drawing_note": drawing_note(run),
        "steps": run.metrics.steps,
        "views": [tokens.show(v, i, scale) for i, v in enumerate(run.views, 1)],
        "scale": scale,
        "kinds": tokens.KINDS,
        "votes": health.independent_voters(run.summary.teachers if run.summary else []),
        "recipe_text": hide_secrets(run.recipe_text) if run.recipe_text is not None else None,
        "open_lines": tokens.OPEN_LINES,
        "shorten": tokens.shorten,
    }


def chart_groups(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the groups of charts, and the numbers behind the charts for the script."""
    groups, data, counter = [], {}, 0
    for group, names in catalogue.grouped(list(run.metrics.series)):
        drawn, blank = [], []
        for name in names:
            counter += 1
            chart = _chart(f"c{counter}", name, run)
            if chart is None:
                continue
            if chart.empty:
                blank.append((name, chart.empty))
                continue
            drawn.append((name, chart))
            data[chart.id] = _for_script(chart)
        known = [c for n, c in drawn if n in catalogue.KNOWN] or [c for _, c in drawn][:OPEN_CHARTS]
        more = [c for _, c in drawn if c not in known]
        groups.append({"group": group, "charts": known, "more": more, "blank": blank, "table": table(run, names)})
    return groups, data


def _chart(id: str, name: str, run: Run) -> charts.Chart | None:
    series = run.metrics.series
    leader = next((k for k, (_, _, members) in catalogue.TOGETHER.items() if name in members), None)
    together = leader is not None and all(m in series for m in catalogue.TOGETHER[leader][2])
    if together and name != leader:
        return None
    known = catalogue.KNOWN.get(name, catalogue.Known("", "", ""))
    if together:
        title, about, labels = catalogue.TOGETHER[leader]
        lines = {metric: (label, series[metric]) for metric, label in labels.items()}
        return charts.build_chart(id, title, known.unit, about, run.metrics.steps, lines)
    return charts.build_chart(id, name, known.unit, known.about, run.metrics.steps, {name: (name, series[name])})


def _for_script(chart: charts.Chart) -> dict[str, Any]:
    return {
        "x": chart.x,
        "y": [float(f"{v:.6g}") for v in chart.y],
        "unit": chart.unit,
        "lines": [
            {
                "label": line.label if len(chart.lines) > 1 else "",
                "points": [(s, charts.number(v), _share(chart, v)) for s, v in line.points],
            }
            for line in chart.lines
        ],
    }


def _share(chart: charts.Chart, value: float) -> float:
    low, high = chart.y
    return round(100 * (high - value) / (high - low), 1)


def table(run: Run, names: list[str]) -> dict[str, Any]:
    """Return the numbers of one group as rows, at most `MAX_ROWS` evenly spaced steps with both ends."""
    steps = run.metrics.steps
    picked = list(range(len(steps)))
    if len(steps) > MAX_ROWS:
        picked = sorted({round(i * (len(steps) - 1) / (MAX_ROWS - 1)) for i in range(MAX_ROWS)})
    rows = [(steps[i], [charts.number(run.metrics.series[n][i]) for n in names]) for i in picked]
    return {"names": names, "rows": rows, "left": len(steps) - len(picked)}


def drawing_note(run: Run) -> str:
    """Return what was simplified in the drawing, or ''."""
    count = len(run.metrics.steps)
    notes = []
    if count > charts.MAX_POINTS:
        notes.append(
            f"{count:,} steps: each curve is drawn through the lowest and highest value of every "
            f"{-(-count // (charts.MAX_POINTS // 2))} steps, so no spike is lost; min, max and last are over all steps."
        )
    if count >= charts.SMOOTH_FROM:
        notes.append("The strong line is a running mean over a twentieth of the values, the faint one the raw values.")
    return " ".join(notes)


def hide_secrets(text: str) -> str:
    """Return recipe text with the values of keys such as `api_key` and `hub_token` hidden."""
    return _SECRET.sub(r"\g<key>(hidden)", text)


def duration(seconds: float | None) -> str:
    """Return seconds as people say them: 48 s, 6 min 12 s, 3 h 04 min."""
    if seconds is None or seconds < 0 or seconds != seconds or seconds == float("inf"):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def when(started: str) -> str:
    """Return an ISO 8601 time as people write it; anything else as it is."""
    try:
        time = datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()


def millions(count: int) -> str:
    """Return a parameter count as people say it: 135 M, 1.24 B."""
    for size, letter in ((1e9, " B"), (1e6, " M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,}"


def split_lines(text: str, limit: int, width: int = 90) -> tuple[str, str, int]:
    """Return (first lines, the rest, number of lines left); a long line counts as several."""
    lines, room = text.split("\n"), limit
    for i, line in enumerate(lines):
        room -= max(1, -(-len(line) // width))
        if room < 0 and i:
            return "\n".join(lines[:i]), "\n".join(lines[i:]), len(lines) - i
    if room < 0:  # one very long line
        head = lines[0][: limit * width]
        return head, text[len(head) :], 1
    return text, "", 0
