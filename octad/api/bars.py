"""Who hears how far a job is: a bar at a terminal or in a notebook, a function of the caller's, or nobody.

with bars(True) as progress: progress("calibrating", 0.5)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from octad import telling
from octad.report import terminal

Report = telling.Progress
Progress = bool | Report
Tell = telling.Tell | None


@contextmanager
def bars(progress: Progress) -> Iterator[Report]:
    """A function that takes a stage's name and the share done, 0 to 1. True: bars on stderr where somebody can see them
    move, a terminal or a notebook."""
    if callable(progress):
        yield progress
        return
    seen = terminal.err.is_terminal or terminal.err.is_jupyter
    with terminal.progress_bar(quiet=not (progress and seen)) as bar:
        yield bar


def teller(tell: Tell) -> telling.Tell:
    """Where lines for the user go; None: nowhere."""
    return tell if tell is not None else telling.silent
