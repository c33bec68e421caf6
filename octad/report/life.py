"""Signs of life: a line where a command has said nothing for a while, also in a pipe, where no bar moves.

    with life.watched():                             # around a whole command
        with life.doing("reading the weights"):      # what is told, should it take long
            ...
        life.reached("calibrating", 0.4)             # a stage and the share done, 0 to 1
        life.heard()                                 # something was printed: silence begins anew

The first line comes after `first` seconds of silence, the next ones at growing distances, so that a log of hours is no
flood. Whoever shows something that moves, or waits for a person, says so (`shown`), and nothing is told meanwhile.
OCTAD_PULSE sets `first`; 0: no lines.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from octad.figures import duration

FIRST = 4.0  # seconds of silence
APART, MOST_APART = 2.5, 7.5  # times FIRST: between the first lines, and between any
KNOWN = 0.03  # of a stage, from which on what is left of it can be told
What = str | Callable[[], str]


@dataclass
class _Stage:
    begun: float
    first: float
    share: float = 0.0

    def line(self, name: str, now: float) -> str:
        """Its name, how far it is, and about how long it still takes."""
        gone, took = self.share - self.first, now - self.begun
        seconds = took * (1 - self.share) / gone if gone > KNOWN and took > 1 else 0.0
        return f"{name}, {int(100 * self.share)} %" + (
            f", about {duration(seconds)} left" if seconds >= 1 else ""
        )


@dataclass
class Work:
    """Something that is being done. `what`: its name, or a function that tells it, "" for nothing. `shown`: something
    moves on the screen, or a person is waited for."""

    what: What
    begun: float
    shown: bool = False
    stages: dict[str, _Stage] = field(default_factory=dict)

    def line(self, now: float) -> str:
        """What is told of it."""
        if callable(self.what):
            return self.what()
        open_stages = [(n, s) for n, s in self.stages.items() if s.share < 1]
        if not open_stages and self.stages:
            open_stages = list(self.stages.items())[-1:]
        if open_stages:
            return "; ".join(stage.line(name, now) for name, stage in open_stages)
        since = now - self.begun
        return f"{self.what}, for {duration(since)} now" if self.what and since >= 1 else self.what


class Life:
    """What is going on, and when something was printed last. `tell` gets a line; `clock` is the time in seconds."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.tell, self.clock = tell, clock
        self.first = FIRST
        self._works: list[Work] = []
        self._lock = threading.RLock()
        self._heard = self._told = clock()
        self._count = 0
        self._ended = threading.Event()

    # ---- what is going on ---------------------------------------------------------------------------------

    @contextmanager
    def doing(self, what: What, *, shown: bool = False) -> Iterator[Work]:
        """What the work inside is called."""
        work = Work(what, self.clock(), shown)
        with self._lock:
            self._works.append(work)
        try:
            yield work
        finally:
            with self._lock:
                self._works.remove(work)
            if work.shown:
                self.heard()

    def reached(self, stage: str, share: float) -> None:
        """A stage of what is being done, and how far it is."""
        with self._lock:
            if self._works:
                now = self.clock()
                self._works[-1].stages.setdefault(stage, _Stage(now, share)).share = share

    def heard(self) -> None:
        """Something was printed, or begun that shows itself."""
        self._heard = self.clock()

    # ---- the lines ----------------------------------------------------------------------------------------

    def due(self) -> str:
        """The line to print now, or "": where somebody spoke a moment ago, or nothing is to be told."""
        now = self.clock()
        apart = self.first * min(APART * self._count, MOST_APART)
        if now - self._heard < self.first or now - self._told < apart:
            return ""
        with self._lock:
            if not self._works or any(work.shown for work in self._works):
                return ""
            line = self._line(now)
        if line:
            self._told, self._count = now, self._count + 1
        return line

    def _line(self, now: float) -> str:
        """Of the innermost work that has something to tell; one that tells itself has the last word."""
        for work in reversed(self._works):
            if (line := work.line(now)) or callable(work.what):
                return line
        return ""

    @contextmanager
    def watched(self, what: str = "at work") -> Iterator[None]:
        """Inside, lines are told, by a thread of its own."""
        self.first = _seconds()
        self._heard, self._told, self._count, self._ended = self.clock(), 0.0, 0, threading.Event()
        if not self.first:
            yield
            return
        threading.Thread(target=self._watch, args=(self._ended,), name="octad life", daemon=True).start()
        try:
            with self.doing(what):
                yield
        finally:
            self._ended.set()

    def rest(self) -> None:
        """No more lines: from now on it is a person's turn."""
        self._ended.set()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(self.first / 8):
            if (line := self.due()) and not ended.is_set():
                self.tell(line)


def _seconds() -> float:
    """FIRST, or what OCTAD_PULSE says."""
    try:
        return max(0.0, float(os.environ.get("OCTAD_PULSE", FIRST)))
    except ValueError:
        return FIRST
