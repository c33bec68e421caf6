"""The streaming checkpoint writer: a plan in, tensors in any order, one rename at the end.

    with CheckpointWriter("mixture", plan) as writer:
        writer.add_text("config.json", text)
        for name in plan:
            writer.write(name, tensor)            # or writer.copy(name, source): from file to file
        writer.commit()                           # or writer.copy_all(names, source): several files at a time

The plan (names, shapes, dtypes) fixes every header and offset before the first tensor is there, so each
tensor goes straight to its place and memory holds one at a time. A shard that is full goes to the disk in the
background while others are filled, so that little is left to wait for at the end. The directory is staged (see
staging.py): an interrupted run leaves nothing under the final name. Headers are written last of all, so what it
leaves under the hidden name does not load either.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch

from octad import portable
from octad.checkpoint.extent import byte_view, write_all
from octad.checkpoint.hf import INDEX
from octad.checkpoint.past_cache import COPIERS, open_past_cache, too_large
from octad.checkpoint.shard_plan import shard_layout
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.errors import CheckpointError, OutputError
from octad.staging import StagedDirectory, abandoned, bytes_in, explained, space
from octad.telling import Share

PIECE_BYTES = 256 << 20  # of a tensor that is copied by several threads


class CheckpointWriter:
    """Writes one model directory in safetensors shards of at most `max_shard_bytes`, atomically.

    Raises OutputError when the output exists (unless `overwrite`, which replaces an earlier checkpoint), when
    the disk is too small or full, or where writing is not permitted; CheckpointError when what is written does
    not fit the plan. `adopt` as StagedDirectory has it: files of the same plan are then gone on with.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        plan: Mapping[str, TensorInfo],
        *,
        max_shard_bytes: float = 5e9,
        overwrite: bool = False,
        adopt: Callable[[Path], bool] | None = None,
    ) -> None:
        self.plan = dict(plan)
        self._stage = StagedDirectory(directory, overwrite=overwrite, adopt=adopt)
        self.directory = self._stage.final
        self._shards, self._places = shard_layout(self.plan, max_shard_bytes)
        self._needed = sum(shard.size for shard in self._shards)
        self._written: set[str] = set()
        self._rows: Counter[str] = Counter()  # of tensors that come row by row
        self._finished = False
        self._left = Counter(shard for shard, _ in self._places.values())
        self._lock = Lock()
        self._files: list[int] = []
        self._past: list[int | None] = []  # the same past the system's cache, where there is so much
        self._sides: list[int] = []
        self._background = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._stage.__enter__()
        try:
            self.check_space()
            with self.explained():
                for shard in self._shards:
                    path = self._stage.path / shard.file
                    fresh = 0 if self.adopted else os.O_CREAT | os.O_EXCL
                    self._files.append(os.open(path, os.O_RDWR | fresh | portable.BINARY, 0o666))
                    _reserve(self._files[-1], shard.size)
                    self._past.append(open_past_cache(path, os.O_WRONLY) if too_large(self._needed) else None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.shutdown(cancel_futures=True)
        self._close()
        self._stage.__exit__(kind, error, trace)

    def _close(self) -> None:
        for fd in (*self._files, *self._sides, *self._past):
            if fd is not None:
                os.close(fd)
        self._files, self._sides, self._past = [], [], []

    def check_space(self) -> None:
        """Raises OutputError when the file system has less free space than the planned tensors need."""
        place = next(p for p in self.directory.parents if p.is_dir())
        ours = [self.stage] if self._stage.is_open else abandoned(self.directory)
        if shutil.disk_usage(place).free + sum(map(bytes_in, ours)) < self._needed:
            raise OutputError(
                f"{self.directory}: {space(place, self._needed)}; free some or choose another -o"
            )

    # ---- contents ------------------------------------------------------------------------------------------

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a planned tensor in its place, converted to the planned dtype; in any order, from any thread, once."""
        self._put(name, self._expect(name, tuple(tensor.shape)), tensor, 0)
        self._done(name)

    def write_rows(self, name: str, first: int, tensor: torch.Tensor) -> None:
        """Rows of a planned tensor from number `first` on, each once; it is written when the last of them is."""
        info = self._expect(name, (*self.plan[name].shape[:1], *tensor.shape[1:]))
        self._put(name, info, tensor, first * (info.nbytes // info.shape[0]))
        with self._lock:
            self._rows[name] += len(tensor)
            whole = self._rows[name] == info.shape[0]
        if whole:
            self._done(name)

    def _put(self, name: str, info: TensorInfo, tensor: torch.Tensor, skipped: int) -> None:
        data = tensor.detach().to("cpu", info.dtype).contiguous().reshape(-1).view(torch.uint8)
        shard, offset = self._places[name]
        with self.explained():
            write_all(self._files[shard], byte_view(data), offset + skipped)

    def copy(self, name: str, source: TensorSource, source_name: str | None = None) -> None:
        """The same as write(name, source.read(source_name or name)).

        Where the source has the bytes on disk as they are planned, they go from file to file: the speed of `cp`, and no
        memory, however large the tensor.
        """
        wanted = source_name or name
        extent = source.extent(wanted)
        if extent is None or extent.info != self.plan.get(name):
            self.write(name, source.read(wanted))
            return
        self._expect(name, extent.info.shape)
        shard, offset = self._places[name]
        with self.explained():
            extent.copy_to(self._files[shard], offset, past=self._past[shard])
        self._done(name)

    def copy_all(
        self,
        names: Sequence[str],
        source: TensorSource,
        progress: Share = lambda done: None,
    ) -> None:
        """copy(name, source) for each name, several shards side by side; `progress` gets the share done, in this thread.

        Meant for what `source` has as extents: what it must compute would be in memory several at a time. Large tensors
        go in pieces, so that all threads are busy to the end."""
        pieces = [(name, first) for name in names for first in self._starts(name, source)]
        left = Counter(name for name, _ in pieces)
        several = {name for name, count in left.items() if count > 1}

        def copy_piece(name: str, first: int) -> None:
            extent = source.extent(name) if name in several else None
            if extent is None:
                self.copy(name, source)
                return
            self._expect(name, extent.info.shape)
            shard, offset = self._places[name]
            with self.explained():
                count = min(PIECE_BYTES, extent.info.nbytes - first)
                extent.copy_to(self._files[shard], offset + first, first, count, self._past[shard])
            with self._lock:
                left[name] -= 1
                whole = not left[name]
            if whole:
                self._done(name)

        # a file takes one write at a time through the cache
        busy = min(os.cpu_count() or 1, len(self._shards))
        pool = ThreadPoolExecutor(COPIERS if any(self._past) else min(COPIERS, busy))
        copies = [pool.submit(copy_piece, *piece) for piece in self._side_by_side(pieces, COPIERS)]
        try:
            for done, copy in enumerate(as_completed(copies), 1):
                copy.result()
                progress(done / len(copies))
        finally:
            pool.shutdown(cancel_futures=True)

    def open_side(self, file: str, nbytes: int) -> int:
        """The descriptor of a side file of so many bytes, which whoever asks for it writes; closed with the writer."""
        with self.explained():
            self._sides.append(
                os.open(self._side(file), os.O_RDWR | os.O_CREAT | os.O_EXCL | portable.BINARY, 0o666)
            )
            _reserve(self._sides[-1], nbytes)
        return self._sides[-1]

    def add_bytes(self, file: str, data: bytes) -> None:
        """A side file, by its bare name."""
        with self.explained():
            self._side(file).write_bytes(data)

    def add_file(self, file: str, write: Callable[[Path], None]) -> None:
        """A side file that is too large for memory: `write` makes it at the path that it is given."""
        with self.explained():
            write(self._side(file))

    def add_text(self, file: str, text: str) -> None:
        """A side file such as config.json, in UTF-8."""
        self.add_bytes(file, text.encode("utf-8"))

    def add_json(self, file: str, value: Any) -> None:
        """A side file of JSON."""
        self.add_text(file, json.dumps(value, indent=2) + "\n")

    def copy_in(self, path: str | os.PathLike[str]) -> None:
        """A copy of an existing file (tokenizer, generation config) under its own name; links are followed."""
        with self.explained():
            shutil.copyfile(path, self._side(Path(path).name))

    @property
    def stage(self) -> Path:
        """The hidden directory in which the files are."""
        return self._stage.path

    @property
    def adopted(self) -> bool:
        """Whether the files are those of a killed process."""
        return self._stage.adopted

    @property
    def written(self) -> frozenset[str]:
        """The tensors that are in their places, perhaps not on the disk yet: see `sync`."""
        with self._lock:
            return frozenset(self._written)

    @property
    def shards(self) -> int:
        """How many files of weights there will be."""
        return len(self._shards)

    @property
    def full_shards(self) -> int:
        """How many of them have all their tensors."""
        with self._lock:
            return sum(not left for left in self._left.values())

    def written_before(self, names: Iterable[str]) -> None:
        """Take tensors as written, by the process whose files were adopted."""
        for name in names:
            self._expect(name, self.plan[name].shape if name in self.plan else ())
            self._done(name)

    def sync(self) -> None:
        """Everything written so far is on the disk when this comes back."""
        with self.explained():
            for file in self._files:
                os.fsync(file)

    def keep(self) -> None:
        """Leave the files where they are when the block ends without a commit, for a later process to adopt."""
        self._stage.keep = True

    def written_elsewhere(self, rows: Mapping[str, int]) -> None:
        """Take tensors as written of which other processes have written so many rows. Raises CheckpointError where they
        are not all of them."""
        for name, count in rows.items():
            if count != (self._expect(name, self.plan[name].shape).shape or (1,))[0]:
                raise CheckpointError(
                    f"{self.directory}: {count} rows of {name} were written, {self.plan[name]} planned"
                )
            self._done(name)

    def finish(self) -> Path:
        """Headers and index: from here on the hidden directory, which is returned, can be read as a checkpoint."""
        if missing := [name for name in self.plan if name not in self._written]:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} planned tensors not written, first {missing[0]}"
            )
        with self.explained():
            for sync in self._syncs:
                sync.result()
            for fd, shard in zip(self._files, self._shards, strict=True):
                os.fsync(fd)  # the data before the header that makes it loadable
                portable.write_at(fd, shard.header, 0)
        if len(self._shards) > 1:
            self.add_json(INDEX, self._index())
        self._finished = True
        return self._stage.path

    def commit(self) -> Path:
        """Finish, fsync, rename: from here on the checkpoint exists. Returns its directory."""
        if not self._finished:
            self.finish()
        with self.explained():
            for fd in self._sides:
                os.fsync(fd)
        self._close()  # Windows renames nothing that is open
        return self._stage.commit()

    # ---- inside --------------------------------------------------------------------------------------------

    def _expect(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        if not self._files:
            raise ValueError("the writer is not open: use it in a `with` block")
        if name not in self.plan:
            raise CheckpointError(f"{self.directory}: tensor {name} was not planned")
        if name in self._written:
            raise CheckpointError(f"{self.directory}: tensor {name} is written twice")
        if shape != self.plan[name].shape:
            raise CheckpointError(
                f"{self.directory}: tensor {name} has shape {list(shape)}, planned was {list(self.plan[name].shape)}"
            )
        return self.plan[name]

    def _done(self, name: str) -> None:
        """A tensor is in its place; a shard that is full is sent to the disk."""
        shard, _ = self._places[name]
        with self._lock:
            self._written.add(name)
            self._left[shard] -= 1
            full = not self._left[shard]
        if full:
            self._syncs.append(self._background.submit(os.fsync, self._files[shard]))

    def _starts(self, name: str, source: TensorSource) -> Iterable[int]:
        """Where the pieces begin in which a tensor is copied; one where it is small or must be read."""
        extent = source.extent(name)
        if extent is None or extent.info != self.plan.get(name):
            return [0]
        return range(0, max(1, extent.info.nbytes), PIECE_BYTES)

    def _side_by_side(self, pieces: Sequence[tuple[str, int]], width: int) -> list[tuple[str, int]]:
        """The pieces in an order in which neighbours lie in different shards: `width` of them are filled at a time."""
        seen: Counter[int] = Counter()
        order: dict[tuple[str, int], tuple[int, int, int]] = {}
        for piece in pieces:
            shard, _ = self._places[piece[0]]
            order[piece] = (shard // width, seen[shard], shard)
            seen[shard] += 1
        return sorted(pieces, key=order.__getitem__)

    def _side(self, file: str) -> Path:
        if (
            not self._stage.is_open
            or Path(file).name != file
            or file in {shard.file for shard in self._shards}
        ):
            raise ValueError(f"{file!r} is not the bare name of a side file, or the writer is not open")
        return self._stage.path / file

    def _index(self) -> dict[str, Any]:
        files = {name: self._shards[shard].file for name, (shard, _) in self._places.items()}
        total = sum(info.nbytes for info in self.plan.values())
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}

    def explained(self) -> AbstractContextManager[None]:
        """Inside, an OSError becomes an OutputError that says what is wrong with the place."""
        return explained(self.directory, self._needed)


def _reserve(fd: int, size: int) -> None:
    """Give a file its blocks at once: a full disk shows before the work, and the writes are faster."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
