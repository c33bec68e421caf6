"""Plots of lines, and pictures that are files of their own.

    loss = lines([Line("french", steps, nats), Line("python", steps, more, dashed=True)], "loss by step", log_x=True)
    Path("run.svg").write_text(document([("bits per byte", loss), ("load", svg.heat(..., named=True))]))

A drawing is as wide as its place (see svg.py). A document needs no style sheet and no fonts, and is the same for the
same data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from octad.report.svg import LABEL, Scale, down, drawing, frame, joined, line, shape, text

LEGEND = 3  # entries of a legend beside each other
COLOURS = 8
PALETTE = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#c2ad00",
    "#8a8780",
)  # Okabe and Ito's
# What a drawing needs outside of the page, whose style sheet has the same classes.
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#676259}.title{font-size:13px;font-weight:600;fill:#1d1c1a}"
    ".grid{stroke:#e3ded5}.axis{stroke:#b9b2a6}.line{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke}"
    ".thin{stroke-width:.7;opacity:.7}.dashed{stroke-dasharray:4 3}.heat rect{fill:#0b5fa5}.heat{overflow:visible}"
    + "".join(f".c{i}{{stroke:{c}}}.fill.c{i}{{fill:{c};stroke:none}}" for i, c in enumerate(PALETTE))
)


@dataclass(frozen=True)
class Line:
    """One line of a plot: its points from left to right (those that are not finite leave a gap), and how it looks.
    colour: 0 to 7, by default the line's place among those with a legend; name: "" for none in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int | None = None
    thin: bool = False
    dashed: bool = False
    dots: bool = False


def lines(
    series: Sequence[Line],
    label: str,
    *,
    x_title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    height: int = 260,
) -> Markup:
    """Lines over a common axis, with their legend below. A logarithmic axis leaves out what is not above zero; `zero`
    has the y axis begin there."""
    kept = [(s, _points(s, log_x, log_y)) for s in series]
    xs = _across([x for _, points in kept for x, _ in points], log_x)
    ys = Scale.of((y for _, points in kept for _, y in points if math.isfinite(y)), zero=zero, log=log_y)
    named = [s for s in series if s.name]
    rows = math.ceil(len(named) / LEGEND)
    top, bottom = 14, height - (42 if x_title else 30) - LABEL * rows
    parts = frame(xs, ys, top, bottom, x_title)
    for s, points in kept:
        place = next((i for i, other in enumerate(named) if other is s), 0)
        colour = (place if s.colour is None else s.colour) % COLOURS
        kind = f"line c{colour}{' thin' * s.thin}{' dashed' * s.dashed}"
        parts.append(_curve(points, xs, ys, top, bottom, kind))
        if s.dots:
            parts += [
                shape("dot", xs.at(x), down(ys, y, top, bottom), f"fill c{colour}")
                for x, y in points
                if math.isfinite(y)
            ]
        if s.name:
            left, y = 100 / LEGEND * (place % LEGEND), height - LABEL * (rows - place // LEGEND) + 10
            parts += [line(left, y - 4, left + 3, y - 4, kind), text(left + 4, y, s.name, "start", "tick")]
    return drawing(height, joined(parts), label, "lines")


def _across(values: Sequence[float], log: bool) -> Scale:
    """From the first value to the last, with room for the labels on the left."""
    low, high = (min(values), max(values)) if values else (1.0, 2.0)
    if high == low:
        high = 2 * low if log else low + 1
    return Scale(low * (low / high) ** 0.07 if log else low - 0.07 * (high - low), high, log)


def _points(s: Line, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    """What can be drawn; a y that cannot is NaN, which parts the line."""
    pairs = ((float(x), float(y)) for x, y in zip(s.x, s.y, strict=True))
    ok = (
        (x, y if math.isfinite(y) and (y > 0 or not log_y) else math.nan)
        for x, y in pairs
        if math.isfinite(x)
    )
    return [(x, y) for x, y in ok if x > 0 or not log_x]


def _curve(
    points: Sequence[tuple[float, float]], xs: Scale, ys: Scale, top: float, bottom: float, kind: str
) -> Markup:
    """A line in a box of 100 by 100 that is stretched to its place."""
    drawn, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            drawn.append(f"{pen}{xs.at(x):.6g} {100 - ys.at(y):.6g}")
        pen = "L" if math.isfinite(y) else "M"
    return Markup(
        '<svg x="0" y="{}" width="100%" height="{}" viewBox="0 0 100 100" preserveAspectRatio="none"'
        ' overflow="visible"><path class="{}" d="{}"/></svg>'
    ).format(top, bottom - top, kind, "".join(drawn))


def document(panels: Sequence[tuple[str, Markup]], *, columns: int = 2, width: int = 960) -> str:
    """A picture of its own, for a file: drawings with their titles, side by side."""
    wide, gap, parts, down = (width - 24 * (columns + 1)) / columns, 24, [], 0
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        tall = max(int(re.search(r'height="([\d.]+)"', drawn)[1]) for _, drawn in row)  # type: ignore[index]
        for at, (title, drawn) in enumerate(row):
            parts.append(
                Markup(
                    '<svg x="{}" y="{}" width="{}" height="{}" overflow="visible"><text class="title" y="16">{}</text>'
                    '<svg y="24" width="100%" height="{}" overflow="visible">{}</svg></svg>'
                ).format(gap + at * (wide + gap), down + gap, wide, tall + 24, title, tall, drawn)
            )
        down += tall + 24 + gap
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}"><style>{2}</style>'
        '<rect width="100%" height="100%" fill="#fff"/>{3}</svg>\n'
    ).format(width, down + gap, Markup(STYLE), joined(parts))
