"""What a measure is given besides the model and the task: a sandbox, and someone to tell how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from octad.sandbox.run import Sandbox
from octad.telling import Share


@dataclass(frozen=True)
class Work:
    """`progress` gets the share done, 0 to 1; `make_sandbox` is called by tasks that run programs."""

    progress: Share = lambda done: None
    make_sandbox: Callable[[], Sandbox] = field(default=Sandbox)

    def part(self, start: float, end: float) -> Work:
        """The same for a part of the work."""
        return replace(self, progress=lambda done: self.progress(start + (end - start) * done))
