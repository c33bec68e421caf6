"""Weights read from their files, rounded and packed by threads that need neither PyTorch nor Python's lock.

    filling = Filling(nbytes)                          # memory of so many bytes
    filling.add(name, Rows(path, offset, bfloat16=True, outputs=1536, inputs=576), bits=8, group=64, start=0, step=9536)
    filling.begin(threads=1)                           # returns at once; meanwhile something else is imported
    filling.finish(); filling.memory, filling.missed

What lies on the disk is read piece by piece into the processor's cache, and goes from there, rounded, to its place: no
weight is ever in memory as it was. As pack of packing.py, which says what the panels are; systems without pread have
Impossible. Who drops a Filling calls `stop`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octad.kernels.compile import BuildError, IsaError, load
from octad.kernels.pages import anonymous

BINARY = getattr(os, "O_BINARY", 0)  # as portable has it, which is above this room

DONE, NOT_FINITE = 1, 3


class Impossible(Exception):
    """The weights cannot be had this way; whoever asked takes the usual one, and that says what is wrong."""


class _Task(ctypes.Structure):
    """native_src/packing.h's Task."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("file", "offset", "dtype", "outputs", "inputs")),
        *((name, ctypes.c_int64) for name in ("bits", "group", "step", "state")),
        ("panels", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Rows:
    """A weight [O, K] on the disk, row after row, in bfloat16 or float32."""

    path: Path
    offset: int
    bfloat16: bool
    outputs: int
    inputs: int


class Filling:
    """Memory that is being filled with packed weights."""

    def __init__(self, nbytes: int) -> None:
        try:
            self.memory = anonymous(nbytes)
        except (OSError, ValueError, OverflowError) as error:
            raise Impossible(str(error)) from error
        self.rows: dict[str, Rows] = {}
        self.files: dict[Path, int] = {}
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._planned: list[_Task] = []
        self._threads: list[threading.Thread] = []
        self._next = ctypes.c_int64(0)
        self._failed = False

    def add(self, name: str, rows: Rows, *, bits: int, group: int, start: int, step: int) -> None:
        """A weight whose first panel goes to `start`, and each further one `step` bytes behind the last. Raises
        Impossible where its file cannot be opened."""
        if rows.path not in self.files:
            try:
                self.files[rows.path] = os.open(rows.path, os.O_RDONLY | BINARY)
            except OSError as error:
                raise Impossible(str(error)) from error
        self.rows[name] = rows
        shape = int(rows.bfloat16), rows.outputs, rows.inputs
        place = self.files[rows.path], rows.offset
        self._planned.append(_Task(*place, *shape, bits, group, step, 0, self._start + start))

    def begin(self, threads: int) -> None:
        """Let threads fill the memory; they die with the process."""
        self._tasks = (_Task * len(self._planned))(*self._planned)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Help until everything is there. Raises Impossible where some of it could not be read, or there are no
        kernels."""
        self._work()
        for thread in self._threads:
            thread.join()
        if self._failed or any(task.state not in (DONE, NOT_FINITE) for task in self._tasks):
            raise Impossible("not all weights could be read")

    @property
    def missed(self) -> list[str]:
        """Once it is finished, the weights with a value that is not finite: they are still to be packed."""
        return [name for name, task in zip(self.rows, self._tasks, strict=True) if task.state == NOT_FINITE]

    def unchanged(self) -> bool:
        """Whether the files that were opened are still those at their paths, of the same size and time."""
        try:
            return all(_state(os.fstat(file)) == _state(os.stat(path)) for path, file in self.files.items())
        except OSError:
            return False

    def stop(self) -> None:
        """End what is not done, and close the files."""
        self._next.value = len(self._planned)
        for thread in self._threads:
            thread.join()
        for file in self.files.values():
            os.close(file)
        self.files, self._threads = {}, []

    def _work(self) -> None:
        try:
            fill = _function()
        except (BuildError, IsaError, AttributeError):
            self._failed = True
            return
        fill(self._tasks, len(self._tasks), ctypes.byref(self._next))


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _function() -> Callable[..., int]:
    found: Callable[..., int] = load().function(
        "fill", [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    )
    return found
