"""Token views as coloured cells: what each token looks like, and which step of the ramp it gets."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from composer_plugins.report.charts import number
from composer_plugins.report.run_folder import TokenView, finite

#: Colour steps of the ramp; step 0 is "carries KL, but next to none".
STEPS = 7
MAX_TOKENS, MAX_MESSAGE_CHARS, OPEN_LINES = 1200, 4000, 6
_SPECIAL = re.compile(r"<\|[^\s|]{1,40}\|>|</?[a-z_]{1,20}>|\[[A-Z_]{2,12}\]")
_LADDER = [m * 10.0**e for e in range(-7, 2) for m in (1, 3)]

KINDS = {
    "recorded": "recorded error",
    "rollout": "error inside the rollout",
    "feedback": "feedback of a reward function",
    "sibling": "success of a sibling rollout",
}


@dataclass(frozen=True)
class Scale:
    """Thresholds in nats between the colour steps, ascending, STEPS - 1 of them; signed: both directions."""

    thresholds: tuple[float, ...]
    signed: bool

    def step(self, nats: float) -> int:
        """Return the colour step of |nats|: 0 .. STEPS - 1."""
        return sum(abs(nats) >= t for t in self.thresholds)

    def legend(self) -> list[tuple[str, str]]:
        """Return (CSS class, text of |nats|) per step, from the most negative to the most positive."""
        t = [number(v) for v in self.thresholds]
        texts = [f"< {t[0]}", *(f"{a}–{b}" for a, b in pairwise(t)), f"≥ {t[-1]}"]
        up = [(f"k{i}", text) for i, text in enumerate(texts)]
        if not self.signed:
            return up
        down = [(f"n{i}", text) for i, text in enumerate(texts) if i]
        return [*reversed(down), *up]


@dataclass(frozen=True)
class Cell:
    """One token: visible whitespace it starts with, the rest, CSS classes, hover text, newlines in it."""

    lead: str
    text: str
    classes: str
    title: str
    newlines: int = 0


@dataclass(frozen=True)
class Shown:
    """One token view, ready to draw. `cells_left` tokens are beyond the drawing limit."""

    view: TokenView
    number: int
    kind: str
    mean: float
    peak: float
    peak_token: str
    carrying: int
    strip: list[str]
    cells: list[Cell]
    cells_left: int


def scale_of(views: Iterable[TokenView]) -> Scale:
    """Return one scale for all views: half-decades that end at the largest below the highest |divergence|
    (at most 3 nats), so that colours compare across views and the legend can name round numbers."""
    values = [d for v in views for d, m in zip(v.divergence, v.mask, strict=True) if m and finite(d)]
    top = max((abs(d) for d in values), default=1.0)
    last = max((i for i, t in enumerate(_LADDER) if t <= min(top, 3.0)), default=0)
    last = max(last, STEPS - 2)
    return Scale(tuple(float(f"{t:.1g}") for t in _LADDER[last - STEPS + 2 : last + 1]), any(d < 0 for d in values))


def show(view: TokenView, position: int, scale: Scale) -> Shown:
    """Return `view` as cells; `position` counts from 1 in the list of the report."""
    inside = [(abs(d), i) for i, (d, m) in enumerate(zip(view.divergence, view.mask, strict=True)) if m and finite(d)]
    peak, where = max(inside, key=lambda p: (p[0], -p[1]), default=(0.0, None))
    rows = list(zip(view.tokens, view.divergence, view.mask, strict=True))
    return Shown(
        view=view,
        number=position,
        kind=KINDS[view.kind],
        mean=view.mean_divergence(),
        peak=peak,
        peak_token="" if where is None else "".join(map(_visible_char, view.tokens[where])),
        carrying=sum(view.mask),
        strip=strip_of(view, scale),
        cells=[_cell(i, *row, scale) for i, row in enumerate(rows[:MAX_TOKENS])],
        cells_left=max(0, len(rows) - MAX_TOKENS),
    )


def _cell(index: int, token: str, nats: float | None, inside: bool, scale: Scale) -> Cell:
    rest = token.lstrip(" \t\r\n")
    lead = "".join(map(_visible_char, token[: len(token) - len(rest)]))
    text = "".join(map(_visible_char, rest)) if token else "∅"
    special = " sp" if _SPECIAL.fullmatch(token.strip()) else ""
    if not inside:
        style, title = "off", "no KL here"
    elif not finite(nats):
        style, title = "bad", "divergence is not a finite number"
    else:
        step = scale.step(nats)
        style, title = f"n{step}" if nats < 0 and step else f"k{step}", f"{number(nats)} nats"
    return Cell(lead, text, f"t {style}{special}", f"token {index}: {title}", token.count("\n"))


def strip_of(view: TokenView, scale: Scale, width: int = 60) -> list[str]:
    """Return the CSS classes of a strip that shows the whole action: the strongest token of each bucket."""
    cells = list(zip(view.divergence, view.mask, strict=True))
    size = max(1, math.ceil(len(cells) / width))
    strip = []
    for start in range(0, len(cells), size):
        inside = [d for d, m in cells[start : start + size] if m and finite(d)]
        strongest = max(inside, key=abs, default=None)
        if strongest is None:
            strip.append("off")
        else:
            step = scale.step(strongest)
            strip.append(f"n{step}" if strongest < 0 and step else f"k{step}")
    return strip


def _visible_char(c: str) -> str:
    table = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"}
    if c in table:
        return table[c]
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{ord(c):04X}⟩"
    return c


def readable(text: str) -> str:
    """Return text for display: line breaks and tabs stay, other control, bidi and invisible characters show."""
    return "".join(c if c in "\n\t" or c == " " else _visible_char(c) for c in text.replace("\r\n", "\n"))


def shorten(text: str, limit: int = MAX_MESSAGE_CHARS) -> tuple[str, int]:
    """Return at most `limit` characters (both ends kept) and how many characters were left out."""
    if len(text) <= limit:
        return text, 0
    head, tail = limit * 3 // 4, limit // 4
    left = len(text) - head - tail
    return f"{text[:head]}\n[… {left:,} characters not shown …]\n{text[-tail:]}", left
