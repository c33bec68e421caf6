"""Copying and reading past the system's cache of files: for what is read and written once, and would not fit in there.

    target = open_past_cache(path, os.O_WRONLY)                  # None where system or file system cannot
    done = copy_past_cache(source, start, target, position, total)

A byte that goes through the cache takes memory there, costs the processor several times what the disk's own transfer
does (on virtual machines, where fresh memory has to come from the host, twenty times), and pushes out what others read.
Past it, a file is read and written in large aligned pieces between the disk and a buffer. What is in the cache is read
there all the same: a member that was downloaded a moment ago needs no disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from octad import portable
from octad.kernels.pages import anonymous

ALIGN = 1 << 16  # of places in files and in memory: no page and no disk's block is larger
CHUNK = 8 << 20  # bytes in one piece
COPIERS = 4  # pieces on their way at the same time, at most
PART_OF_MEMORY = 4  # what is larger than this part would push everything else out
MOSTLY = 0.5  # in the cache: read there
_BUFFERS = threading.local()


def too_large(nbytes: int) -> bool:
    """Whether so many bytes had better not go through the cache."""
    return nbytes > portable.memory_bytes() / PART_OF_MEMORY > 0


def open_past_cache(path: str | os.PathLike[str], flags: int) -> int | None:
    """A descriptor of an existing file whose reads and writes pass the cache by; None where there are none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return None


@contextlib.contextmanager
def opened_past_cache(path: Path, cached: int, start: int, total: int) -> Iterator[int | None]:
    """For reading, inside the block; None where there is none, or most of this stretch is in the cache (`cached`: the
    file as it is opened already)."""
    wanted = portable.cached_share(cached, start, total) < MOSTLY
    file = open_past_cache(path, os.O_RDONLY) if wanted else None
    try:
        yield file
    finally:
        if file is not None:
            os.close(file)


def copy_past_cache(path: Path, source: int, start: int, target: int, position: int, total: int) -> int:
    """Copy from byte `start` of the file at `path`, opened as `source`, to `position` of what open_past_cache gave; how
    many of the `total` bytes were copied: fewer where one side fails or cannot. Position and total are multiples of
    ALIGN."""
    done = 0
    with (
        contextlib.suppress(OSError),  # whoever goes on from here meets the error, and knows whose it is
        opened_past_cache(path, source, start, total) as past,
    ):
        while done < total:
            count = min(CHUNK, total - done)
            view = read_piece(source, past, start + done, count)
            if view is None:
                break
            while view:
                written = os.pwrite(target, view, position + done)
                done, view = done + written, view[written:]
    return done


def read_piece(source: int, past: int | None, start: int, count: int) -> memoryview | None:
    """At most CHUNK bytes of a file, in an aligned buffer of this thread, which its next call fills again; None where the
    file ends before. Past the cache where there is a descriptor for that. Raises OSError."""
    aligned, raw = _buffers()
    if past is None:
        return aligned[:count] if _filled(source, aligned[:count], start, count) else None
    skipped = start % ALIGN
    whole = -(-(skipped + count) // ALIGN) * ALIGN
    if not _filled(past, raw[:whole], start - skipped, skipped + count):
        return None
    if not skipped:
        return raw[:count]
    aligned[:count] = raw[skipped : skipped + count]
    return aligned[:count]


def _filled(file: int, view: memoryview, start: int, needed: int) -> bool:
    """Read into `view` until `needed` bytes are there."""
    done = 0
    while done < needed:
        got = portable.read_into(file, view[done:], start + done)
        if not got:
            return False
        done += got
    return True


def _buffers() -> tuple[memoryview, memoryview]:
    """This thread's two: for a piece, and for one with what lies around it."""
    if not hasattr(_BUFFERS, "views"):
        _BUFFERS.views = memoryview(anonymous(CHUNK)), memoryview(anonymous(CHUNK + 2 * ALIGN))
    views: tuple[memoryview, memoryview] = _BUFFERS.views
    return views
