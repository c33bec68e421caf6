"""Reading records from a file by threads, what is waited for before what may be wanted.

    reader = RecordReader(path, cached=True)
    ticket = reader.ask(record.offset, memory, urgent=False)     # a prefetch; `memory` is filled in the background
    reader.hurry(ticket)                                         # now it is waited for
    reader.wait([ticket])                                        # raises CheckpointError

A record is read in pieces by several threads: one request at a time leaves a disk waiting, and a piece is what a demand
waits for at most. `cached`: through the system's page cache, which is as good as memory where there is room for the file;
without room it would only be copied through, and is passed by (O_DIRECT) where the file system can.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from octad import portable
from octad.errors import CheckpointError

PIECE = 1 << 20
THREADS = 4
NOW, LATER = 0, 1


@dataclass
class Ticket:
    """A read that was asked for."""

    offset: int
    memory: memoryview
    left: int  # pieces that are not read yet
    urgent: bool
    waiting: set[int] = field(default_factory=set)  # pieces that no thread has taken
    error: OSError | None = None

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return self.left == 0


class RecordReader:
    """A file and its threads. Raises CheckpointError where it cannot be opened."""

    def __init__(self, path: Path, *, cached: bool = True, threads: int = THREADS) -> None:
        self.path = path
        self._file = _open(path, cached)
        # the threads hold the reader until they end; a process that ends closes what is open by itself
        self._shut = weakref.finalize(self, os.close, self._file)
        self._shut.atexit = False
        self._queue: list[tuple[int, int, Ticket, int]] = []
        self._count, self._closed = itertools.count(), False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()
        # a daemon thread that is in the middle of something while the interpreter goes down can take it along
        atexit.register(self._leave)

    def ask(self, offset: int, memory: memoryview, *, urgent: bool) -> Ticket:
        """Begin to fill `memory` from byte `offset` on."""
        pieces = range(0, len(memory), PIECE)
        ticket = Ticket(offset, memory, len(pieces), urgent, set(pieces))
        with self._changed:
            self._push(ticket)
        return ticket

    def hurry(self, ticket: Ticket) -> None:
        """Put it before everything that is not waited for."""
        with self._changed:
            if not ticket.urgent:
                ticket.urgent = True
                self._push(ticket)

    def wait(self, tickets: Sequence[Ticket]) -> None:
        """Until all of them are there."""
        with self._changed:
            self._changed.wait_for(lambda: all(ticket.done for ticket in tickets))
        for ticket in tickets:
            if ticket.error is not None:
                raise CheckpointError(f"{self.path}: cannot be read: {ticket.error.strerror or ticket.error}")

    def end(self) -> None:
        """Let the threads end, and the file be closed behind them; for anywhere, since it does not wait."""
        atexit.unregister(self._leave)  # which holds the reader
        self._stop()

    def close(self) -> None:
        """End the threads and close the file."""
        atexit.unregister(self._leave)
        self._leave()
        self._shut()

    def _leave(self) -> None:
        """End the threads, each behind the piece that it reads."""
        self._stop()
        for thread in self._threads:
            thread.join()

    def _stop(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _push(self, ticket: Ticket) -> None:
        rank = NOW if ticket.urgent else LATER
        for piece in ticket.waiting:
            heapq.heappush(self._queue, (rank, next(self._count), ticket, piece))
        self._changed.notify_all()

    def _take(self) -> tuple[Ticket, int] | None:
        """The next piece; None at the end. Of one that was put into the queue twice, the first counts."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return None
                _, _, ticket, piece = heapq.heappop(self._queue)
                if piece in ticket.waiting:
                    ticket.waiting.discard(piece)
                    return ticket, piece

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            ticket, piece = taken
            error = None
            try:
                self._fill(ticket.memory[piece : piece + PIECE], ticket.offset + piece)
            except OSError as failed:
                error = failed
            with self._changed:
                ticket.error = ticket.error or error
                ticket.left -= 1
                if ticket.done:
                    self._changed.notify_all()

    def _fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            got = portable.read_into(self._file, view[done:], offset + done)
            if not got:
                raise OSError(0, "became shorter while it was read")
            done += got


def _open(path: Path, cached: bool) -> int:
    if not cached and hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):  # a file system in memory
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        file = os.open(path, os.O_RDONLY | portable.BINARY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reads as large as they are asked for
    return file
