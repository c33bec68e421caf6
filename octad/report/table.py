"""A table as data. Terminal, HTML and Markdown are three ways to write the same cells; a report's JSON holds the numbers.

    table = Table.of("Price", ["contestant", ">bits per byte"], [["soup", Cell("0.801", 0.801, mark="best")]])
    terminal.table(table), html.table(table), markdown.table(table)

A cell has the text that people read, and the number behind it as it stands in the report, by which columns sort.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MOST_EXPERTS = 16  # side by side; of more, those that are used most


@dataclass(frozen=True)
class Column:
    """A heading. `plot` columns are drawings, which text formats leave out."""

    title: str
    numeric: bool = False
    plot: bool = False
    hint: str = ""
    speaker: int | None = None  # an expert's number, whose colour the column has


@dataclass(frozen=True)
class Cell:
    """text: what is read; value: the number behind it; mark: a class of the style sheet and a word for what it says
    (best, better, worse, ...); small: what is said less loudly; tint: 0 to 1, for heat maps; speaker: an expert's
    number, whose colour it has."""

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

    @classmethod
    def of(
        cls,
        caption: str,
        titles: Iterable[str],
        rows: Iterable[Iterable[str | Cell]],
        **rest: str | Sequence[str],
    ) -> Table:
        """From plain texts; a title that begins with ">" is that of a column of numbers."""
        columns = [Column(title.removeprefix(">"), title.startswith(">")) for title in titles]
        cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
        return cls(caption, columns, cells, **rest)  # type: ignore[arg-type]

    def row_marks(self) -> list[tuple[str, Sequence[Cell]]]:
        """Each row with its mark."""
        marks = list(self.marks) or [""] * len(self.rows)
        return list(zip(marks, self.rows, strict=True))


def busiest(used: Sequence[float]) -> list[int]:
    """The experts that have room beside each other: all, or the MOST_EXPERTS that are used most, in their own order."""
    return sorted(sorted(range(len(used)), key=lambda e: -used[e])[:MOST_EXPERTS])


def judged(low: float | None, high: float | None, *, lower_is_better: bool = True) -> str:
    """better, worse or unclear, by the side of zero on which the whole interval lies."""
    if low is None or high is None or low <= 0 <= high:
        return "unclear"
    return "better" if (high < 0) == lower_is_better else "worse"
