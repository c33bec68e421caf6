"""RowWriter: some rows of planned tensors, written by one of several processes into files that another has opened.

    with CheckpointWriter(directory, plan) as writer:          # one process: makes the files, and finishes them
        with RowWriter(writer.stage, plan) as rows:            # every process, at its rows or tensors
            rows.write(name, first, tensor)
        writer.written_elsewhere(counts)                       # the rows that all of them wrote, by name
        writer.commit()

The plan fixes where everything lies, so that processes need to agree on nothing else and no tensor has to be put together
anywhere. All of them have to see the directory. What was written is on the disk when the block ends.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Self

import torch

from octad import portable
from octad.checkpoint.extent import byte_view, write_all
from octad.checkpoint.past_cache import COPIERS, open_past_cache, too_large
from octad.checkpoint.shard_plan import shard_layout
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.errors import CheckpointError, OutputError
from octad.staging import explained


class RowWriter:
    """Writes into the staged files of a CheckpointWriter of the same plan and shard size. Raises OutputError where they
    cannot be written, CheckpointError for what is not planned. `rows` counts, by name, those that were written."""

    def __init__(self, stage: Path, plan: Mapping[str, TensorInfo], max_shard_bytes: float = 5e9) -> None:
        self.stage, self.plan = stage, plan
        self._shards, self._places = shard_layout(plan, max_shard_bytes)
        self._files: dict[int, int] = {}
        self._past: dict[int, int | None] = {}  # the same past the system's cache, where there is so much
        self._large = too_large(sum(info.nbytes for info in plan.values()))
        self.rows: Counter[str] = Counter()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with explained(self.stage):
            for file in self._files.values():
                if error[0] is None:
                    os.fsync(file)
                os.close(file)
            for past in self._past.values():
                if past is not None:
                    os.close(past)
        self._files, self._past = {}, {}

    def sync(self) -> None:
        """Everything written so far is on the disk when this comes back."""
        with explained(self.stage):
            for file in self._files.values():
                os.fsync(file)

    def write(self, name: str, first: int, tensor: torch.Tensor) -> None:
        """Rows of a planned tensor from number `first` on, converted to its dtype."""
        info = self.plan.get(name)
        height = info.shape[0] if info else 0
        if info is None or tensor.shape[1:] != info.shape[1:] or first + len(tensor) > height:
            raise CheckpointError(
                f"{self.stage}: rows {list(tensor.shape)} of {name} from {first} on are not planned"
            )
        data = tensor.detach().to("cpu", info.dtype).contiguous().reshape(-1).view(torch.uint8)
        file, offset = self._place(name)
        with explained(self.stage):
            write_all(file, byte_view(data), offset + first * (info.nbytes // max(1, height)))
        self._count(name, len(tensor))

    def copy_all(self, names: Sequence[str], source: TensorSource) -> None:
        """Whole tensors as the source has them, from file to file where that can be, several at a time."""
        with ThreadPoolExecutor(min(COPIERS, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda name: self._copy(name, source), names))

    def _copy(self, name: str, source: TensorSource) -> None:
        extent = source.extent(name)
        if extent is None or extent.info != self.plan.get(name):
            self.write(name, 0, source.read(name))
            return
        file, offset = self._place(name)
        with explained(self.stage):
            extent.copy_to(file, offset, past=self._past[self._places[name][0]])
        self._count(name, extent.info.shape[0])

    def _count(self, name: str, rows: int) -> None:
        with self._lock:
            self.rows[name] += rows

    def _place(self, name: str) -> tuple[int, int]:
        shard, offset = self._places[name]
        path = self.stage / self._shards[shard].file
        with self._lock:
            if shard not in self._files:
                try:
                    self._files[shard] = os.open(path, os.O_RDWR | portable.BINARY)
                    self._past[shard] = open_past_cache(path, os.O_WRONLY) if self._large else None
                except OSError as error:
                    raise OutputError(
                        f"{path}: cannot be opened ({error.strerror}); all processes have to see the directory"
                    ) from error
            return self._files[shard], offset
