"""SIGTERM and Ctrl-C as a wish instead of a blow: the step is finished and saved first.

    with StopRequest() as stop:
        while not stop.requested: ...

The second signal of a kind has its usual effect, for whoever cannot wait. One of each is one wish: a launcher may answer
a Ctrl-C, which its processes have got from the terminal too, with a SIGTERM. (torchrun hands on what it gets itself.)
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Set by the first SIGTERM or SIGINT within the block; earlier handlers are put back, each after its signal."""

    def __init__(self) -> None:
        self.requested = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            self._earlier = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self._earlier):
            self._restore(number)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore(signal.Signals(number))

    def _restore(self, number: signal.Signals) -> None:
        signal.signal(number, self._earlier.pop(number))


class Throttle:
    """Shows a name's share done twice a second at most, and its end."""

    def __init__(self, show: Callable[[str, float], Any], every: float = 0.25) -> None:
        self._show, self._every, self._last = show, every, 0.0

    def __call__(self, name: str, done: float) -> None:
        """A name's share."""
        if done >= 1 or time.monotonic() - self._last > self._every:
            self._last = time.monotonic()
            self._show(name, done)
