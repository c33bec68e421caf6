"""The report's tables as data: HTML and Markdown are two ways to write the same cells.

    table = Table("bits per byte", [Column("contestant"), Column("mean", numeric=True)], rows)
    number(0.98765), signed(-0.0123), human(692_000_000), percent(0.125)

A cell has the text that people read, and the number behind it as it stands in the report, by which columns sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MISSING = "–"
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
COUNTS = {"G": "B"}  # people count parameters in billions


@dataclass(frozen=True)
class Column:
    """A heading; `plot` columns are drawings, which text formats leave out."""

    title: str
    numeric: bool = False
    plot: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Cell:
    """text: what is read; value: the number behind it; mark: a class of the style sheet and a word for what it says
    (best, better, worse, ...); tint: 0 to 1, for heat maps; speaker: an expert's number, whose colour it has."""

    text: str
    value: float | None = None
    mark: str = ""
    small: str = ""
    plot: Markup | None = None
    tint: float | None = None
    speaker: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns. axis: what stands below the plot column."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    axis: Markup | None = None
    kind: str = ""
    marks: Sequence[str] = field(default_factory=tuple)  # of the rows

    def row_marks(self) -> list[tuple[str, Sequence[Cell]]]:
        """Each row with its mark."""
        marks = list(self.marks) or [""] * len(self.rows)
        return list(zip(marks, self.rows, strict=True))


def number(value: float | None, digits: int = 4) -> str:
    """Fixed digits, with a true minus sign."""
    if value is None:
        return MISSING
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 4) -> str:
    """As number, but with a plus sign; zero has none."""
    if value is None:
        return MISSING
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %".replace("-", "−")


def human(value: float | None, unit: str = "") -> str:
    """Three digits and a prefix: 692 M, 1.08 B, of a unit 1.38 GB."""
    if value is None:
        return MISSING
    for size, prefix in UNITS:
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = max(0, 2 - int(math.log10(abs(scaled))))
            return f"{scaled:.{digits}f} {prefix if unit else COUNTS.get(prefix, prefix)}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def round_count(value: float) -> str:
    """A round number of things: 500 M, 1 B."""
    return human(value).replace(".00", "").replace(".0 ", " ")


def interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """An interval in brackets; "" where there is none."""
    if low is None or high is None:
        return ""
    return f"[{signed(low, digits)}, {signed(high, digits)}]"


def judged(low: float | None, high: float | None, *, lower_is_better: bool = True) -> str:
    """better, worse or unclear, by the side of zero on which the whole interval lies."""
    if low is None or high is None:
        return "unclear"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == lower_is_better else "worse"
