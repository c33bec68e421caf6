"""What the commands print: tables, colours, progress. Only the command line uses it.

    out.print(table(Table.of("Price", ["contestant", ">bits per byte"], rows)))

Results go to stdout, progress to stderr; without a terminal there is no colour and no moving bar. A table that is wider
than the terminal goes on below itself, its first column repeated: a figure is never cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import rich.table
from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from octad.report.life import Life
from octad.report.table import Cell, Table


class _Heard(Console):
    """A console that tells when something was printed on it. No terminal is 0 characters wide: COLUMNS=0, or a width that
    a pseudo-terminal was never told, is none.

    What moves at a terminal (`moving`, a bar or a spinner on stderr) has to be told of a line that is to stand above it,
    a line on stdout too where both streams are that terminal."""

    moving = 0

    def set_live(self, live: Any) -> Any:
        """As rich; counted."""
        self.moving += 1
        return super().set_live(live)

    def clear_live(self) -> None:
        """As rich; counted."""
        self.moving -= 1
        super().clear_live()

    @property
    def size(self) -> ConsoleDimensions:
        """Characters and lines, as rich finds them."""
        found = super().size
        return found if found.width else found._replace(width=80)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        self._width, self._height = new

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich prints."""
        if self is out and err.moving and self.is_terminal and err.is_terminal:
            err.print(*objects, **options)
            return
        super().print(*objects, **options)
        life.heard()


out = _Heard(highlight=False)  # as wide as COLUMNS, or the terminal of any standard stream, or 80 characters
err = _Heard(stderr=True, highlight=False)
life = Life(lambda line: err.print(f"octad: {line}", markup=False, soft_wrap=True))
# The first is the terminal's own text colour, whatever its background; no two of the others are shades of one colour.
COLOURS = ("default", "green", "cyan", "magenta", "yellow", "bright_red", "bright_blue", "sandy_brown")
STYLES = {"best": "bold", "better": "green", "yes": "green", "worse": "red", "no": "red", "unclear": "yellow"}
ROWS = {"mixture": "cyan", "mean": "bold"}
GAP = 2  # blanks between columns
WORDS = 24  # characters: a column of words needs no more


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr with time left; call it with a stage's name and the share done, 0 to 1.

    It appears with the first call (never, where `quiet`; in a pipe `life` tells instead), and vanishes where the work
    inside fails."""
    columns = (TextColumn("{task.description:12}"), BarColumn(40), TextColumn("{task.percentage:3.0f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
    tasks: dict[str, TaskID] = {}
    was_quiet = err.quiet

    def update(stage: str, done: float) -> None:
        """A stage's share, from 0 to 1."""
        life.reached(stage, done)
        if quiet:
            return
        work.shown = err.is_terminal
        bar.start()  # not before there is something to show; harmless when started
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=1.0)
        bar.update(tasks[stage], completed=done)

    try:
        with life.doing("") as work:
            yield update
    except BaseException:
        bar.live.transient = True  # an error is one line, with no half-full bar above it
        err.quiet = was_quiet or not err.is_terminal  # rich would leave an empty line in a file
        raise
    finally:
        if tasks:
            bar.stop()
        err.quiet = was_quiet


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign of life while something is done whose length nobody knows; in a pipe `life` tells."""
    moving = err.is_terminal and not err.quiet
    with life.doing(what, shown=moving), err.status(what) if moving else nullcontext():
        yield


def table(t: Table) -> RenderableType:
    """A table to print: caption, headings, rows, note; drawings are left out."""
    return _Fitted(t)


def facts(pairs: Iterable[tuple[str, str]]) -> RenderableType:
    """Names and what is said of them, a line each, what is long going on beneath itself."""
    grid = rich.table.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    for name, value in pairs:
        grid.add_row(name, Text(value))
    return grid


class _Fitted:
    """Lays a table out for the width that there is when it is printed."""

    def __init__(self, t: Table) -> None:
        self.table = t

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        t = self.table
        if t.caption:
            yield Text(t.caption, style="italic")
        used = [i for i, column in enumerate(t.columns) if not column.plot]
        for group in self._groups(used, options.max_width):
            yield self._part(group)
        if t.note:
            yield Text(t.note, style="dim")

    def _groups(self, used: list[int], width: int) -> list[list[int]]:
        """The columns that stand beside each other; the first of them stands in each group."""
        widths = {i: max(text.cell_len for text in self._texts(i)) for i in used}
        for i in used[1:]:
            if not self.table.columns[
                i
            ].numeric:  # sentences may go on below, figures and drawings of bars not
                words = (word for text in self._texts(i) for word in text.plain.split())
                widths[i] = min(widths[i], max(WORDS, *map(cell_len, words), 0))
        first, groups, left = used[0], [used[:1]], width - widths[used[0]]
        for i in used[1:]:
            if widths[i] + GAP > left and len(groups[-1]) > 1:
                groups.append([first])
                left = width - widths[first]
            groups[-1].append(i)
            left -= widths[i] + GAP
        return groups

    def _texts(self, i: int) -> list[Text]:
        """A column from its heading down. Numbers with something behind them are filled up on the left by hand, so that
        they stand below each other."""
        column, cells = self.table.columns[i], [row[i] for row in self.table.rows]
        wide = max((cell_len(cell.text) for cell in cells), default=0) if self._led(i) else 0
        return [Text(column.title), *(_text(cell, wide) for cell in cells)]

    def _led(self, i: int) -> bool:
        return self.table.columns[i].numeric and any(row[i].small for row in self.table.rows)

    def _part(self, group: list[int]) -> rich.table.Table:
        part = rich.table.Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        columns = [self._texts(i) for i in group]
        for i, (title, *_) in zip(group, columns, strict=True):
            column = self.table.columns[i]
            style = None if column.speaker is None else speaker_style(column.speaker)
            side: Any = "right" if column.numeric and not self._led(i) else "left"
            part.add_column(title, justify=side, no_wrap=column.numeric, style=style)
        for (mark, _), *cells in zip(self.table.row_marks(), *(texts[1:] for texts in columns), strict=True):
            part.add_row(*cells, style=ROWS.get(mark))
        return part


def _text(cell: Cell, wide: int = 0) -> Text:
    """The cell's text in the style of its mark, `wide` at least, and what is said less loudly behind it."""
    style = next((STYLES[word] for word in cell.mark.split() if word in STYLES), "")
    if cell.speaker is not None:
        style = speaker_style(cell.speaker)
    return Text.assemble((f"{cell.text:>{wide}}", style), (f" {cell.small}" if cell.small else "", "dim"))


def say(line: str) -> None:
    """One line on stdout as it is: names and paths may hold brackets, and be longer than the terminal is wide."""
    out.print(line, markup=False, soft_wrap=True)


def remark(line: str) -> None:
    """Prose beside the results, on stdout: headings, what was written, what to do next. Nothing under -q."""
    if not err.quiet:
        say(line)


def tell(line: str) -> None:
    """One line of a run's report on stderr, as it is; of torchrun's processes only the first speaks."""
    if leads():
        err.print(line, markup=False, soft_wrap=True)


def leads() -> bool:
    """False in all of torchrun's processes but the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def speaker_style(speaker: int | None) -> str:
    """The colour of an expert."""
    return COLOURS[(speaker or 0) % len(COLOURS)]
