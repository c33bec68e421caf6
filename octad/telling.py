"""How work that takes time tells how far it is, and what the user should know of it. Who shows that is not its business.

def combine(plan, *, progress: Progress = quiet, tell: Tell = silent) -> Path:
    progress("writing", 0.5)
    tell("one expert is the base again")
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]  # the name of a stage, and the share of it that is done, 0 to 1
Share = Callable[[float], None]  # of one stage
Tell = Callable[[str], None]  # a line


def quiet(stage: str, done: float) -> None:
    """A Progress that shows nothing."""


def silent(line: str) -> None:
    """A Tell that says nothing."""
