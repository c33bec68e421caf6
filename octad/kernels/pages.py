"""Memory of large pages for weights: reading 4 kB pages in order costs a third of the bandwidth in address translation.

    memory = anonymous(1 << 30)          # zeros that cost nothing until they are touched

Linux only grants huge pages to memory that asks for it (`madvise`); elsewhere this is ordinary memory. Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import mmap


def anonymous(nbytes: int, ordinary: int = 0) -> mmap.mmap:
    """Zeros, in pages that cost nothing until they are touched, huge ones where the system has them, but for the first
    `ordinary` bytes (whole pages). Raises OSError, OverflowError or ValueError where it does not give so much."""
    # shared memory gets no huge pages
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, nbytes, **private)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes > ordinary:
        with contextlib.suppress(OSError):  # a system built without them: ordinary pages do
            memory.madvise(mmap.MADV_HUGEPAGE, ordinary, nbytes - ordinary)
    return memory
