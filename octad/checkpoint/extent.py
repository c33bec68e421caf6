"""Extent: where a tensor lies on disk, to read it, to read some of it, or to copy and compare it without holding it.

    extent.read()                              # in memory of its own
    extent.copy_to(descriptor, position)       # from file to file
    same_bytes(extent, [other, another])       # [True, False]

What shapes this is memory. A mapped file's pages count as resident, so weights are read with preadv; for large ones
the memory is asked for in huge pages, since faulting in 4 KiB pages costs more than the copy itself. What is only
copied or compared never becomes a tensor: the kernel copies from file to file, and comparing goes through a buffer
that stays in the processor's cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from octad import portable
from octad.checkpoint.past_cache import (
    ALIGN,
    CHUNK,
    copy_past_cache,
    opened_past_cache,
    read_piece,
    too_large,
)
from octad.checkpoint.source import TensorInfo
from octad.errors import CheckpointError
from octad.kernels.arena import fresh

CHUNK_BYTES = 64 << 20
BUFFER_BYTES = 1 << 20
STRIPE_BYTES = 64 << 20  # compared by one thread
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Extent:
    """A tensor on disk: the file, the offset of its first byte, its shape and dtype (contiguous, row major)."""

    path: Path
    offset: int
    info: TensorInfo

    def part(self, first: int, shape: tuple[int, ...]) -> Extent:
        """The contiguous piece of this shape that begins at value number `first`. Raises CheckpointError past the end."""
        info = TensorInfo(shape, self.info.dtype)
        self._check_inside(first, info.numel)
        return Extent(self.path, self.offset + first * info.dtype.itemsize, info)

    def read(self, past: bool = False) -> torch.Tensor:
        """The tensor in memory of its own; with `past`, what is not in the system's cache comes past it. Raises
        CheckpointError when the file cannot be read to the end."""
        data = empty_bytes(self.info.nbytes)
        with self.opened() as file:
            view = byte_view(data)
            done = self._fill_past(file, view) if past else 0
            self.fill(file, view[done:], done)
        return data.view(self.info.dtype).view(self.info.shape)

    def _fill_past(self, file: int, view: memoryview) -> int:
        done = 0
        with (
            contextlib.suppress(OSError),  # `fill` goes on, and says what is wrong
            opened_past_cache(self.path, file, self.offset, len(view)) as past,
        ):
            while past is not None and done < len(view):
                count = min(CHUNK, len(view) - done)
                if (piece := read_piece(file, past, self.offset + done, count)) is None:
                    break
                view[done : done + count] = piece
                done += count
        return done

    def blocks(self, starts: Sequence[int], count: int) -> torch.Tensor:
        """The runs of `count` values that begin at these value numbers, [len(starts), count].

        Raises CheckpointError as `read` does, and for a run that would reach into what lies behind the tensor."""
        for start in (min(starts, default=0), max(starts, default=0)):
            self._check_inside(start, count if len(starts) else 0)
        size = self.info.dtype.itemsize
        data = empty_bytes(len(starts) * count * size)
        view = byte_view(data)
        with self.opened() as file:
            for place, start in enumerate(starts):
                self.fill(file, view[place * count * size : (place + 1) * count * size], start * size)
        return data.view(self.info.dtype).view(len(starts), count)

    def _check_inside(self, first: int, count: int) -> None:
        if not 0 <= first <= first + count <= self.info.numel:
            raise CheckpointError(
                f"{self.path}: values {first} to {first + count} of a tensor {list(self.info.shape)} were asked for,"
                f" which has {self.info.numel}"
            )

    def copy_to(
        self, target: int, position: int, first: int = 0, count: int | None = None, past: int | None = None
    ) -> None:
        """Write the tensor's bytes at `position` of the open file `target`: in the kernel where it can, else by a buffer.
        Of a piece, from its byte number `first` on, `count` of them. `past`: the target opened past the cache, for all
        of the piece but its ends (see past_cache.py).

        Raises CheckpointError when the source cannot be read to the end, OSError when the target cannot be written."""
        total = self.info.nbytes - first if count is None else count
        with self.opened() as file:
            done = 0
            if past is not None and (inside := total - (ends := -position % ALIGN)) >= CHUNK:
                self._copy(file, target, position, first, ends)
                inside -= inside % ALIGN
                start = self.offset + first + ends
                done = ends + copy_past_cache(self.path, file, start, past, position + ends, inside)
            self._copy(file, target, position + done, first + done, total - done)

    def _copy(self, file: int, target: int, position: int, first: int, total: int) -> None:
        done = _copied_by_the_kernel(file, self.offset + first, target, position, total)
        buffer = byte_view(empty_bytes(min(BUFFER_BYTES, total - done)))
        while done < total:
            piece = buffer[: total - done]
            self.fill(file, piece, first + done)
            write_all(target, piece, position + done)
            done += len(piece)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The descriptor of its file inside the block. Raises CheckpointError."""
        try:
            file = os.open(self.path, os.O_RDONLY | portable.BINARY)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        try:
            yield file
        finally:
            os.close(file)

    def fill(self, file: int, view: memoryview, first: int) -> None:
        """Fill `view` with the tensor's bytes from number `first` on, out of its opened file. Errors as for `blocks`."""
        if first + len(view) > self.info.nbytes:
            raise CheckpointError(f"{self.path}: bytes behind the end of a tensor were asked for")
        start, done = self.offset + first, 0
        while done < len(view):
            try:
                got = portable.read_into(file, view[done : done + CHUNK_BYTES], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not got:
                raise CheckpointError(f"{self.path}: became shorter while it was read; copy it again")
            done += got


def _copied_by_the_kernel(source: int, start: int, target: int, position: int, total: int) -> int:
    """How many of `total` bytes the system copied between two open files: fewer where it cannot, or one side fails."""
    done = 0
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # whoever goes on from here meets the error, and knows whose it is
            while count := min(CHUNK_BYTES, total - done):
                got = os.copy_file_range(source, target, count, start + done, position + done)
                if not got:
                    break
                done += got
    return done


def write_all(target: int, view: memoryview, position: int) -> None:
    """Write all of `view` at `position` of an open file. Raises OSError."""
    done = 0
    while done < len(view):
        done += portable.write_at(target, view[done : done + CHUNK_BYTES], position + done)


def same_bytes(ours: Extent, theirs: Sequence[Extent]) -> list[bool]:
    """For each of `theirs`, tensors as large as ours: True where its bytes are the same. Reads no further than needed, of
    large ones by all cores, and nothing of what is the same place of the same file (linked ones, too)."""
    same, total = [True] * len(theirs), ours.info.nbytes
    with contextlib.ExitStack() as stack:
        file, *files = [stack.enter_context(extent.opened()) for extent in (ours, *theirs)]
        read = [n for n, other in enumerate(theirs) if not _one_place(file, ours, files[n], other)]
        past = too_large(sum(os.fstat(file).st_size for file in (file, *(files[n] for n in read))))

        def compare(first: int, end: int) -> None:
            with contextlib.ExitStack() as opened:
                mine = opened.enter_context(_Stretch.of(ours, file, first, end, past))
                others = {
                    n: opened.enter_context(_Stretch.of(theirs[n], files[n], first, end, past)) for n in read
                }
                step = CHUNK if past else BUFFER_BYTES
                for start in range(first, end, step):
                    if not (left := [n for n in read if same[n]]):
                        return
                    count = min(step, end - start)
                    wanted = mine.held(start, count)
                    for number in left:
                        if wanted != others[number].piece(start, count):
                            same[number] = False

        if not read or total <= STRIPE_BYTES:
            compare(0, total)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                starts = range(0, total, STRIPE_BYTES)
                list(pool.map(lambda start: compare(start, min(start + STRIPE_BYTES, total)), starts))
    return same


@dataclass
class _Stretch:
    """A part of a tensor that one thread reads from its opened file, or past the cache."""

    extent: Extent
    file: int
    past: int | None
    buffer: bytearray = field(default_factory=bytearray)

    @classmethod
    @contextlib.contextmanager
    def of(cls, extent: Extent, file: int, first: int, end: int, past: bool) -> Iterator[_Stretch]:
        """Inside the block; `past`: past the cache, where that can be and the stretch is not in there."""
        start, total = extent.offset + first, end - first
        opened = opened_past_cache(extent.path, file, start, total) if past else contextlib.nullcontext()
        with opened as descriptor:
            yield cls(extent, file, descriptor)

    def piece(self, first: int, count: int) -> bytearray | memoryview:
        """Until the next piece of any is read in this thread. As arrays of bytes they are compared by memcmp, five times
        as fast as tensors. Raises CheckpointError."""
        if self.past is not None:
            with contextlib.suppress(OSError):
                view = read_piece(self.file, self.past, self.extent.offset + first, count)
                if view is not None:
                    return view
        if len(self.buffer) != count:
            self.buffer = bytearray(count)
        self.extent.fill(self.file, memoryview(self.buffer), first)
        return self.buffer

    def held(self, first: int, count: int) -> bytearray:
        """The same, until its own next piece is read."""
        found = self.piece(first, count)
        return found if isinstance(found, bytearray) else bytearray(found)


def _one_place(file: int, ours: Extent, other: int, theirs: Extent) -> bool:
    return ours.offset == theirs.offset and os.path.sameopenfile(file, other)


def byte_view(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, shared with it."""
    return memoryview(cast(Any, data.numpy()))


def empty_bytes(count: int) -> torch.Tensor:
    """Uninitialised uint8 memory [count]; from 2 MiB on in huge pages, where the system has them."""
    if count < HUGE_PAGE_BYTES:
        return torch.empty(count, dtype=torch.uint8)
    return fresh(count)
