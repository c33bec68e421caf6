"""What the commands print: tables, colours, progress. Only the command line uses it.

Results go to stdout, progress to stderr; without a terminal there is no colour and no moving bar.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False)
# The first is the terminal's own text colour, whatever its background; no two of the others are shades of one colour.
COLOURS = ("default", "green", "cyan", "magenta", "yellow", "bright_red", "bright_blue", "sandy_brown")


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr with time left; call it with a stage's name and the share done, 0 to 1.

    It appears with the first call (never, where `quiet`), and vanishes where the work inside fails."""
    columns = (TextColumn("{task.description:12}"), BarColumn(40), TextColumn("{task.percentage:3.0f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
    tasks: dict[str, TaskID] = {}

    def update(stage: str, done: float) -> None:
        if quiet:
            return
        bar.start()  # not before there is something to show; harmless when started
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=1.0)
        bar.update(tasks[stage], completed=done)

    try:
        yield update
    except BaseException:
        bar.live.transient = True  # an error is one line, with no half-full bar above it
        err.quiet = not err.is_terminal  # rich would leave an empty line in a file
        raise
    finally:
        if tasks:
            bar.stop()
        err.quiet = False


def say(line: str) -> None:
    """One line on stdout as it is: names and paths may hold brackets, and be longer than the terminal is wide."""
    out.print(line, markup=False, soft_wrap=True)


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
