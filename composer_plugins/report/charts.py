"""Geometry of the small line charts: axes, downsampling, paths. Pure numbers in, strings out.

Every chart is an SVG of WIDTH x HEIGHT units that is stretched to the width of its card; its strokes do
not scale and its labels are HTML, so that text stays the same size on a phone and on a wall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from composer_plugins.report.run_folder import finite

WIDTH, HEIGHT = 300, 100
#: A curve with more points than this is drawn by the lowest and highest of each bucket of steps.
MAX_POINTS = 300
#: From this many points on, a running mean is drawn over the raw values.
SMOOTH_FROM = 60
#: Values beyond HUGE are treated like infinities, ranges below TINY as flat: both have no readable axis.
HUGE, TINY = 1e100, 1e-100

Point = tuple[int, float]


@dataclass
class Line:
    """One metric's curve. `points` is what is drawn; `low`, `high` and `last` are over all finite values.

    `gaps` are steps where the value was measured and was not finite, `unmeasured` counts the steps
    without a value.
    """

    metric: str
    label: str
    points: list[Point]
    low: float
    high: float
    last: float
    last_step: int
    gaps: list[int]
    unmeasured: int
    measured: int
    bucket: int = 1
    window: int = 0
    path: str = ""
    dots: str = ""
    smooth: str = ""


@dataclass
class Chart:
    """One card: title, unit, meaning, the lines, and the ticks as (percent, text)."""

    id: str
    title: str
    unit: str
    about: str
    lines: list[Line]
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    zero: float | None
    empty: str = ""
    marks: list[float] = field(default_factory=list)


def number(value: float | None, figures: int = 4) -> str:
    """Return a value in about `figures` significant digits: 0.0421, 12.4, 1,284, 3.1e-5."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.{figures - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = max(0, figures - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def short(value: float | None) -> str:
    """Return a value for a headline: three significant digits."""
    return number(value, 3)


def nice_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return the round numbers inside [low, high], two to five of them, each with its text."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [0.0 if i == 0 else i * step for i in range(first, last + 1)]
    if step >= 1e-4 and max(map(abs, ticks)) < 1e5:
        digits = next(d for d in range(9) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
        return [(t, f"{t:,.{digits}f}") for t in ticks]
    return [(t, number(float(f"{t:.6g}"))) for t in ticks]


def y_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the value range to draw: it starts at 0 unless all values are far from it, and is never flat."""
    low, high = min(values), max(values)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    elif 0.6 * low <= high <= 0:
        high = 0.0
    if high - low <= max(1e-9 * max(abs(low), abs(high)), TINY):
        pad = abs(high) * 0.5 if abs(high) > TINY else 1.0
        return (low - pad, max(high, 0.0)) if low < 0 else (0.0, high + pad)
    pad = 0.06 * (high - low)
    return low - pad if low else low, high + pad if high else high


def downsample(points: list[Point], limit: int = MAX_POINTS) -> tuple[list[Point], int]:
    """Return at most `limit` points and the bucket size: each bucket keeps its lowest and highest point,
    in order of steps, so that no spike is lost. Unchanged (bucket 1) when there are few enough."""
    if len(points) <= limit:
        return points, 1
    bucket = math.ceil(len(points) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(points), bucket):
        part = points[start : start + bucket]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return kept, bucket


def running_mean(points: list[Point], window: int) -> list[Point]:
    """Return the centred mean over `window` points (fewer at the ends), at each point."""
    total, sums = 0.0, [0.0]
    for _, value in points:
        total += value
        sums.append(total)
    half, n = window // 2, len(points)
    result = []
    for i, (step, _) in enumerate(points):
        a, b = max(0, i - half), min(n, i + half + 1)
        result.append((step, (sums[b] - sums[a]) / (b - a)))
    return result


def build_line(metric: str, label: str, steps: list[int], values: list[float | None]) -> Line | None:
    """Return the curve of one metric, or None when no value is finite (no paths yet: see `build_chart`)."""
    all_points = [(s, v) for s, v in zip(steps, values, strict=True) if _drawable(v)]
    if not all_points:
        return None
    gaps = [s for s, v in zip(steps, values, strict=True) if v is not None and not _drawable(v)]
    points, bucket = downsample(all_points)
    numbers = [v for _, v in all_points]
    return Line(
        metric=metric,
        label=label,
        points=points,
        low=min(numbers),
        high=max(numbers),
        last=numbers[-1],
        last_step=all_points[-1][0],
        gaps=gaps,
        unmeasured=sum(v is None for v in values),
        measured=len(numbers),
        bucket=bucket,
    )


def build_chart(
    id: str, title: str, unit: str, about: str, steps: list[int], series: dict[str, tuple[str, list[float | None]]]
) -> Chart:
    """Return one chart of the metrics in `series` (metric name to its label and values per step)."""
    built = {name: build_line(name, label, steps, values) for name, (label, values) in series.items()}
    lines = [line for line in built.values() if line]
    chart = Chart(id, title, unit, about, lines, (0, 1), (0, 1), [], [], None)
    if not lines:
        measured = sum(v is not None for _, values in series.values() for v in values)
        chart.empty = "Never a finite number in this run." if measured else "Not measured in any step of this run."
        return chart
    low, high = y_range([v for line in lines for v in (line.low, line.high)])
    chart.y = low, high
    first, last = steps[0], steps[-1]
    chart.x = (first, last) if last > first else (first - 1, last + 1)
    chart.y_ticks = [(round(100 * (high - t) / (high - low), 2), text) for t, text in nice_ticks(low, high)]
    chart.x_ticks = _x_ticks(chart.x, steps)
    chart.zero = round(HEIGHT * high / (high - low), 2) if low < 0 < high else None
    chart.marks = sorted({_x(chart, s) for line in lines for s in line.gaps})[:MAX_POINTS]
    for line in lines:
        values = series[line.metric][1]
        everything = [(s, v) for s, v in zip(steps, values, strict=True) if _drawable(v)]
        line.path = _path(chart, line.points, line.gaps)
        if len(line.points) <= 40:
            line.dots = "".join(f"M{_xy(chart, p)}h0" for p in line.points)
        if len(everything) >= SMOOTH_FROM and len(lines) == 1 and line.high > line.low:
            line.window = 2 * (len(everything) // 40) + 1
            line.smooth = _path(chart, _thin(running_mean(everything, line.window)), line.gaps)
    return chart


def _x_ticks(x: tuple[float, float], steps: list[int]) -> list[tuple[float, str]]:
    chosen = [steps[0]] if len(steps) == 1 else [steps[0], steps[-1]]
    if len(steps) > 4:
        chosen.insert(1, steps[len(steps) // 2])
    return [(round(100 * (s - x[0]) / (x[1] - x[0]), 2), f"{s:,}") for s in chosen]


def _thin(points: list[Point], limit: int = 150) -> list[Point]:
    stride = math.ceil(len(points) / limit)
    kept = points[::stride]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _path(chart: Chart, points: list[Point], gaps: list[int]) -> str:
    """SVG path through the points, broken where a value between two of them was not finite."""
    remaining = sorted(gaps, reverse=True)
    parts, pen = [], "M"
    previous = None
    for point in points:
        crossed = False
        while remaining and remaining[-1] < point[0]:
            gap = remaining.pop()
            crossed = crossed or (previous is not None and gap > previous)
        pen = "M" if previous is None or crossed else "L"
        parts.append(pen + _xy(chart, point))
        previous = point[0]
    return "".join(parts)


def _x(chart: Chart, step: float) -> float:
    return round(WIDTH * (step - chart.x[0]) / (chart.x[1] - chart.x[0]), 1)


def _xy(chart: Chart, point: Point) -> str:
    low, high = chart.y
    return f"{_x(chart, point[0]):g} {round(HEIGHT * (high - point[1]) / (high - low), 1):g}"


def _drawable(value: float | None) -> bool:
    return finite(value) and abs(value) <= HUGE
