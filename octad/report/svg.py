"""Plots as small SVG drawings that are as wide as their place: forest plots, heat maps, scatter plots (lines: plot.py).

    scale = Scale.of([-0.3, 0.0, 0.02]); whisker(scale, -0.1, -0.2, 0.02, "better"); axis(scale)

Positions across are per cent, so a drawing fits a telephone and a sheet of paper without its text being scaled; colours
are variables of the style sheet, so it follows light and dark. Plotting libraries do neither: their SVG has fixed
colours and a fixed width, and embeds its fonts as outlines. Shapes repeat what colours say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from octad.figures import human, number

ROW = 26  # pixels: height of a row of a forest plot
MARK = 6.0  # pixels: half the width of a mark
LABEL = 15  # pixels: a label needs this much height
CHARACTER = 7.0  # pixels: width of a character of a label, about
NARROW = 300.0  # pixels: the plot's width on a telephone, for which labels are placed


@dataclass(frozen=True)
class Scale:
    """From values to per cent of the width."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, zero: bool = True, log: bool = False, pad: float = 0.05) -> Scale:
        """Around the values, and around zero where asked, with some room on both sides."""
        known = [v for v in values if math.isfinite(v)] + ([0.0] if zero else [])
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if log and low > 0:
            room = (high / low) ** pad if high > low else 1.2
            return cls(low / room, high * room, True)
        room = (high - low) * pad or abs(high) * pad or 1.0
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        """Per cent, 0 to 100."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 3)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside: 1, 2 or 5 times a power of ten apart; on a logarithmic scale, those values themselves."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            return found[:: max(1, math.ceil(len(found) / most))]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * m for m in (1, 2, 5, 10, 20) if (self.high - self.low) / (step * m) <= most)
        first = math.ceil(self.low / step)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step) + 1)]


def drawing(height: int, body: Markup, label: str, kind: str = "") -> Markup:
    """An SVG as wide as its place."""
    return Markup(
        '<svg class="{}" width="100%" height="{}" role="img" aria-label="{}" focusable="false">{}</svg>'
    ).format(kind, height, label, body)


def joined(parts: Iterable[Markup]) -> Markup:
    """The parts one after the other."""
    return Markup("").join(parts)


def line(x1: float, y1: Any, x2: float, y2: Any, kind: str) -> Markup:
    """A straight line; x in per cent, y in pixels or a text with its unit."""
    return Markup('<line class="{}" x1="{}%" y1="{}" x2="{}%" y2="{}"/>').format(kind, x1, y1, x2, y2)


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "", dx: float = 0) -> Markup:
    """A label."""
    return Markup('<text class="{}" x="{}%" y="{}" dx="{}" text-anchor="{}">{}</text>').format(
        kind, x, y, dx, anchor, content
    )


# ---- shapes --------------------------------------------------------------------------------------------------

SHAPES = {
    "dot": "M-2 0A2 2 0 1 0 2 0A2 2 0 1 0-2 0Z",
    "circle": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
    "ring": "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0-4 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0-6.5 6.5 0 0 6.5-6.5 0Z",
    "triangle": "M0-6 6 5H-6Z",
    "cross": "M-5-5 5 5M-5 5 5-5",
    "star": "M0-7 1.8-2.2 7-2.2 2.8 1 4.3 6 0 3-4.3 6-2.8 1-7-2.2-1.8-2.2Z",
}
VERDICTS = {"better": "circle", "worse": "square", "unclear": "ring"}
KINDS = {
    "member": "ring",
    "soup": "square",
    "ensemble": "triangle",
    "oracle": "diamond",
    "mixture": "circle",
    "dense": "cross",
    "model": "star",
}


def shape(name: str, x: float, y: float, kind: str, title: str = "") -> Markup:
    """A mark at x per cent and y pixels, with a title that shows when pointed at."""
    told = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<svg x="{}%" y="{}" overflow="visible"><path class="{}" d="{}">{}</path></svg>').format(
        x, y, kind, SHAPES[name], told
    )


def key(name: str, kind: str) -> Markup:
    """The same mark inside a line of text."""
    return Markup(
        '<svg class="key" width="16" height="16" viewBox="-8 -8 16 16" aria-hidden="true"><path class="{}" d="{}"/></svg>'
    ).format(kind, SHAPES[name])


# ---- plots ---------------------------------------------------------------------------------------------------


def whisker(
    scale: Scale, value: float, low: float | None, high: float | None, verdict: str, label: str
) -> Markup:
    """One row of a forest plot: a point, its interval, and the line of no difference where zero is in sight."""
    middle, parts = ROW / 2, []
    if scale.low <= 0 <= scale.high:
        parts.append(line(scale.at(0), 0, scale.at(0), ROW, "zero"))
    if low is not None and high is not None:
        parts.append(line(scale.at(low), middle, scale.at(high), middle, f"whisker {verdict}"))
        parts += [
            line(scale.at(x), middle - 4, scale.at(x), middle + 4, f"whisker {verdict}") for x in (low, high)
        ]
    parts.append(shape(VERDICTS.get(verdict, "circle"), scale.at(value), middle, f"point {verdict}", label))
    return drawing(ROW, joined(parts), label, "forest")


def axis(scale: Scale) -> Markup:
    """The ticks below a forest plot; those of class `extra` are left out where it is narrow."""
    ticks = scale.ticks(4)
    zero = min(ticks, key=abs, default=0.0)
    far = max(ticks, key=lambda t: abs(t - zero), default=0.0)
    parts = [line(0, 0.5, 100, 0.5, "axis")]
    for tick, label in zip(ticks, labels(ticks), strict=True):
        parts += [line(scale.at(tick), 0, scale.at(tick), 5, "axis")]
        anchor = "start" if scale.at(tick) < 6 else "end" if scale.at(tick) > 94 else "middle"
        parts += [text(scale.at(tick), 17, label, anchor, "tick" if tick in (zero, far) else "tick extra")]
    return drawing(22, joined(parts), "scale", "forest")


def spark(values: Sequence[float], low: float, high: float, label: str) -> Markup:
    """A line over the layers, between two bounds that all rows of a table share."""
    height = 34
    span = (high - low) or 1.0
    points = [
        f"{100 * i / max(1, len(values) - 1):.2f},{100 - 100 * (v - low) / span:.2f}"
        for i, v in enumerate(values)
    ]
    body = Markup(
        '<line class="grid" x1="0" y1="0.5" x2="100%" y2="0.5"/><line class="grid" x1="0" y1="{}" x2="100%" y2="{}"/>'
        '<svg x="0" y="2" width="100%" height="{}" viewBox="0 0 100 100" preserveAspectRatio="none" overflow="visible">'
        '<polyline class="spark" points="{}"/></svg>'
    ).format(height - 0.5, height - 0.5, height - 4, " ".join(points))
    return drawing(height, body, label, "sparkline")


def heat(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    columns: Sequence[int],
    title: str,
    peak: float,
    *,
    named: bool = False,
) -> Markup:
    """A heat map: a row an expert, a column a layer. Values are shares; `peak` has the full colour. `named`: with the
    rows' names on the left and the first and last column below, for a drawing that stands alone."""
    left = 14 if named else 0
    height, width = 15, (100 - left) / max(1, len(columns))
    parts = []
    if named:
        parts += [text(left - 1, height * r + 11, name, "end", "tick") for r, name in enumerate(names)]
        ends = ((left, "start", columns[0]), (100, "end", columns[-1]))
        parts += [text(x, height * len(rows) + 13, f"layer {c}", anchor, "tick") for x, anchor, c in ends]
    for r, (name, row) in enumerate(zip(names, rows, strict=True)):
        for c, value in enumerate(row):
            parts.append(
                Markup(
                    '<rect x="{:.3f}%" y="{}" width="{:.3f}%" height="{}" fill-opacity="{:.3f}">'
                    "<title>{}, layer {}: {:.1f} %</title></rect>"
                ).format(
                    left + c * width,
                    r * height,
                    width,
                    height - 1,
                    shade(value / peak),
                    name,
                    columns[c],
                    100 * value,
                )
            )
    return drawing(len(rows) * height + (18 if named else 0), joined(parts), title, "heat")


def shade(share: float) -> float:
    """Opacity of a share of the peak: more than in proportion, so that small shares can be told apart."""
    return round(math.pow(min(1.0, max(0.0, share)), 0.7), 3)


def down(ys: Scale, value: float, top: float, bottom: float) -> float:
    """Pixels from the top."""
    return round(bottom - (bottom - top) * ys.at(value) / 100, 2)


def frame(xs: Scale, ys: Scale, top: float, bottom: float, x_title: str = "") -> list[Markup]:
    """Grid, ticks and what is across."""
    parts, ticks = [], ys.ticks(6)
    for tick, label in zip(ticks, labels(ticks), strict=True):
        y = down(ys, tick, top, bottom)
        parts += [line(0, y, 100, y, "grid"), text(0, y - 4, label, "start", "tick")]
    parts += [line(0, bottom, 100, bottom, "axis")]
    for tick in xs.ticks(5):
        anchor = "start" if xs.at(tick) < 5 else "end" if xs.at(tick) > 95 else "middle"
        parts += [line(xs.at(tick), bottom, xs.at(tick), bottom + 5, "axis")]
        parts += [text(xs.at(tick), bottom + 18, human(tick), anchor, "tick")]
    return parts + ([text(50, bottom + 30, x_title, "middle", "tick")] if x_title else [])


@dataclass(frozen=True)
class Point:
    """One contestant of the scatter plot; `front`: nobody is both cheaper and better; label: "" for none."""

    name: str
    kind: str
    x: float
    y: float
    front: bool
    label: str


def scatter(points: Sequence[Point], label: str, height: int = 340) -> Markup:
    """Quality over price, cheap on the left, good at the bottom; a stepped line along the front."""
    top, bottom = 14, height - 30
    xs = Scale.of((p.x for p in points), zero=False, log=True, pad=0.12)
    ys = Scale.of((p.y for p in points), zero=False, pad=0.08)

    def y_at(value: float) -> float:
        return down(ys, value, top, bottom)

    parts = frame(xs, ys, top, bottom)
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    for a, b in pairwise(front):
        parts += [line(xs.at(a.x), y_at(a.y), xs.at(b.x), y_at(a.y), "front")]
        parts += [line(xs.at(b.x), y_at(a.y), xs.at(b.x), y_at(b.y), "front")]
    parts += _labels(points, xs, y_at, top, bottom)
    for p in points:
        kind = f"mark {p.kind}{' on-front' if p.front else ''}"
        parts.append(shape(KINDS.get(p.kind, "ring"), xs.at(p.x), y_at(p.y), kind, p.name))
    return drawing(height, joined(parts), label, "scatter")


def _labels(
    points: Sequence[Point], xs: Scale, y_at: Callable[[float], float], top: float, bottom: float
) -> list[Markup]:
    """Labels beside their points, moved up or down until none covers another on a narrow screen."""
    places = [(xs.at(p.x) / 100 * NARROW, y_at(p.y)) for p in points]
    taken = [(x - MARK, x + MARK, y) for x, y in places]
    parts = []
    for p in sorted((p for p in points if p.label), key=lambda p: y_at(p.y)):
        left = xs.at(p.x) > 60
        start = xs.at(p.x) / 100 * NARROW + (-10 - CHARACTER * len(p.label) if left else 10)
        end, y = start + CHARACTER * len(p.label), y_at(p.y)
        offsets = sorted((n * 3 for n in range(-40, 41)), key=abs)
        free = (y + d for d in offsets if top <= y + d <= bottom - 4)
        spot = next(
            (s for s in free if all(end < a or start > b or abs(s - t) >= LABEL for a, b, t in taken)), y
        )
        taken.append((start, end, spot))
        parts.append(
            text(
                xs.at(p.x),
                spot + 4,
                p.label,
                "end" if left else "start",
                f"label {p.kind}",
                -11 if left else 11,
            )
        )
    return parts


def labels(ticks: Sequence[float]) -> list[str]:
    """The ticks in as many digits as tell them apart, all the same."""
    digits = max((len(f"{t:.10g}".partition(".")[2]) for t in ticks if "e" not in f"{t:.10g}"), default=0)
    return [number(t, digits) if t else "0" for t in ticks]
