"""Memory for weights in huge pages: reading 4 kB pages in order costs a third of the bandwidth in address translation.

    arena = Arena()
    weight = arena.copy(weight)         # the same values, in memory that the system may back by huge pages

Linux only grants huge pages to memory that asks for it (`madvise`); elsewhere this is ordinary memory.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch

from octad.kernels.pages import anonymous
from octad.kernels.panels import ALIGN

CHUNK = 64 << 20


class Arena:
    """Hands out aligned pieces of large anonymous mappings; they live as long as a tensor in them does."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the CPU."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if len(self._free) < nbytes:
            self._free = fresh(max(self.chunk, nbytes))
        piece, self._free = self._free[:nbytes], self._free[-(-nbytes // ALIGN) * ALIGN :]
        return piece.view(dtype).view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of a tensor."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def fresh(nbytes: int, ordinary: int = 0) -> torch.Tensor:
    """Zeros, uint8 [nbytes], in pages that cost nothing until they are touched, huge ones where the system has them, but
    for the first `ordinary` bytes. Raises OSError, OverflowError or ValueError where it does not give so much."""
    return torch.frombuffer(anonymous(nbytes, ordinary), dtype=torch.uint8)


def mapped(path: Path, nbytes: int) -> torch.Tensor:
    """A file's first bytes, uint8 [nbytes], mapped: read from the disk where they are touched, and shared with the
    system's cache. What is written to them stays in memory. Raises OSError or ValueError, where the file is shorter."""
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # read in large pieces, where file systems have them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
