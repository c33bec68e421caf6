"""A file of records: weights laid out as some code wants them in memory, to be mapped or read one record at a time.

    layout = RecordLayout({"layers.0.experts.3": [Part("...w1.weight", 96, 9536, 0, 19072), ...]})
    with CheckpointWriter(...) as writer:
        records = RecordWriter(writer, "packed.octad", layout, "panels16")
        records.put("...w1.weight", panels_PB)
        records.finish(weights)                       # names what the file was made of
    file = RecordFile.open(directory / "packed.octad", layout, "panels16", weights)

Beside a checkpoint's weights it is a second form of them, which nobody needs: engines do not know the name, and octad
goes without it where it is missing, was made of other weights, or is laid out for other code. So its header promises
little: a format, the layout's name, sizes and digests of the weight files, and a digest of the plan. Where a record lies
follows from the plan, which whoever opens the file makes from the checkpoint itself.

A record begins at a multiple of ALIGN, so that it can be read past the system's page cache, and pages hold one record's
bytes. Shapes: P panels of a weight, B bytes of each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import byte_view, write_all
from octad.checkpoint.record_layout import HEADER, RecordLayout
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import CheckpointError
from octad.fingerprint import fingerprint
from octad.guard import parse_json

MAGIC, FORMAT = b"octadrec", 1
SAMPLED = 1 << 20  # weight files above this size are told apart by samples of them


class RecordWriter:
    """Writes a side file of a checkpoint in the making; parts in any order. Raises OutputError as the writer does."""

    def __init__(self, writer: CheckpointWriter, file: str, layout: RecordLayout, kind: str) -> None:
        self.layout, self.kind = layout, kind
        self._writer, self._file = writer, writer.open_side(file, layout.nbytes)

    def put(self, name: str, panels_PB: torch.Tensor) -> None:
        """A weight's panels, uint8 [P, B], in their place."""
        record, part = self.layout.places[name]
        if tuple(panels_PB.shape) != (part.panels, part.size):
            raise ValueError(f"{name}: {list(panels_PB.shape)} panels, planned {[part.panels, part.size]}")
        rows = [panels_PB.reshape(-1)] if part.step == part.size else panels_PB.contiguous().unbind()
        with self._writer.explained():
            for number, row in enumerate(rows):
                write_all(self._file, byte_view(row), record.offset + part.start + number * part.step)

    def finish(self, weights: Sequence[Path]) -> None:
        """The header, once the weight files that the records were made of are complete."""
        header = _header(self.layout, self.kind, weights)
        with self._writer.explained():
            write_all(self._file, memoryview(header), 0)


class RecordFile:
    """A file of records that belongs to a plan and to weights. Raises CheckpointError, one line, where it does not."""

    def __init__(self, path: Path, layout: RecordLayout) -> None:
        self.path, self.layout = path, layout

    @classmethod
    def open(cls, path: Path, layout: RecordLayout, kind: str, weights: Sequence[Path]) -> RecordFile:
        """The file, once its header says that it belongs here."""
        try:
            with open(path, "rb") as file:
                size, begin = os.fstat(file.fileno()).st_size, file.read(HEADER)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        found, wanted = _parsed(path, begin), _parsed(path, _header(layout, kind, weights))
        for key in ("format", "layout", "weights", "records"):
            if found.get(key) != wanted[key]:
                raise CheckpointError(f"{path}: has other {key} than this checkpoint and this octad ask for")
        if size != layout.nbytes:
            raise CheckpointError(f"{path}: has {size} bytes in place of {layout.nbytes}")
        return cls(path, layout)


def _header(layout: RecordLayout, kind: str, weights: Sequence[Path]) -> bytes:
    """What the file begins with."""
    made_of = [fingerprint(path, whole=SAMPLED) for path in weights]
    says: dict[str, Any] = {"format": FORMAT, "layout": kind, "weights": made_of, "records": layout.digest}
    text = json.dumps(says).encode()
    if len(MAGIC) + 8 + len(text) > HEADER:  # thousands of shards: one digest for all
        says["weights"] = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        text = json.dumps(says).encode()
    return MAGIC + len(text).to_bytes(8, "little") + text


def _parsed(path: Path, begin: bytes) -> dict[str, Any]:
    length = int.from_bytes(begin[8:16], "little")
    if begin[:8] != MAGIC or length > HEADER - 16:
        raise CheckpointError(f"{path}: is no file of records")
    found = parse_json(begin[16 : 16 + length], str(path), CheckpointError)
    return found if isinstance(found, dict) else {}
