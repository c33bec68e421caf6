"""The header of a GGUF file: its metadata and the table of its tensors, read without touching the weights.

    header = GGUFHeader.read(Path("model.Q4_1.gguf"))
    header.metadata["general.architecture"], header.tensors["token_embd.weight"].shape

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The
`gguf` package has a reader too; it builds one numpy view per value, which takes seconds for the tokens and
merges of a real vocabulary, and it does not stop at a count that reaches past the end of the file. This one
walks the bytes once and checks every length.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octad.errors import CheckpointError

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT64 = 8, 9, 10


@dataclass(frozen=True)
class GGUFTensor:
    """One row of the tensor table. `shape` has the slowest dimension first (as torch); `offset` counts from
    the file's start.
    """

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GGUFHeader:
    """Everything that precedes the weights. Metadata values are Python scalars, strings, or lists and tuples
    of them.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    @classmethod
    def read(cls, path: Path) -> GGUFHeader:
        """Read and check a header. Raises CheckpointError for what is not GGUF, is cut short, or lies about a
        length.
        """
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                if file.read(4) != MAGIC:
                    raise CheckpointError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    metadata, tensors = _Walker(data).header()
                    return cls(path, len(data), metadata, tensors)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, struct.error) as error:
            raise CheckpointError(
                f"{path}: truncated or damaged GGUF file: {error}; fetch it again"
            ) from error


class _Walker:
    """A cursor over the header's bytes; ValueError where a length reaches past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = len(MAGIC)

    def header(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """Version, counts, metadata, tensor table; in that order in the file."""
        version = self.scalar("I")
        if version not in (2, 3):
            big_endian = version & 0xFFFF == 0
            raise ValueError(
                "it is big-endian" if big_endian else f"version {version} (versions 2 and 3 are read)"
            )
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            if key in metadata:
                raise ValueError(f"metadata key {key!r} occurs twice")
            metadata[key] = self.value(self.scalar("I"))
        rows = [self.tensor() for _ in range(tensor_count)]
        return metadata, self.placed(rows, metadata.get("general.alignment", DEFAULT_ALIGNMENT))

    def placed(self, rows: list[tuple[str, GGUFTensor]], alignment: Any) -> dict[str, GGUFTensor]:
        """The tensor table with offsets made absolute: the data begin at the next multiple of the alignment."""
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r} is not a power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, row in rows:
            if name in tensors:
                raise ValueError(f"tensor {name!r} occurs twice")
            tensors[name] = GGUFTensor(row.shape, row.type, start + row.offset)
        return tensors

    def take(self, count: int) -> int:
        """Move on by `count` bytes and return where they begin."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise ValueError(f"the header ends at byte {len(self.data)}, inside a value of {count} bytes")
        self.at = end
        return start

    def scalar(self, code: str) -> Any:
        """One number or flag, by its struct code."""
        layout = "<" + code
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        """A 64-bit length and that many bytes of UTF-8."""
        length = self.scalar("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        """A metadata value of a given type id."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any] | tuple[Any, ...]:
        """`count` values of one type; numbers in one go, strings one by one."""
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise ValueError(f"unknown array type {kind}")
        itemsize = struct.calcsize("<" + _SCALARS[kind])
        start = self.take(itemsize * count)
        return struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, start)

    def strings(self, count: int) -> list[str]:
        """`count` strings, in one tight loop: a vocabulary and its merges are a hundred thousand."""
        self.check_room(8 * count)
        data, at, found = self.data, self.at, []
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > len(data):
                raise ValueError(
                    f"the header ends at byte {len(data)}, inside a string of {at - start} bytes"
                )
            found.append(data[start:at].decode("utf-8"))
        self.at = at
        return found

    def check_room(self, count: int) -> None:
        """ValueError unless at least `count` bytes are left."""
        if self.at + count > len(self.data):
            raise ValueError(f"an array of {count} bytes reaches past the end of the file")

    def tensor(self) -> tuple[str, GGUFTensor]:
        """Name, dimensions (fastest first on disk), type and offset from the start of the data."""
        name = self.string()
        dimensions = self.array(_UINT64, self.dimension_count(name))
        return name, GGUFTensor(tuple(reversed(dimensions)), self.scalar("I"), self.scalar("Q"))

    def dimension_count(self, name: str) -> int:
        """1 to 4."""
        count: int = self.scalar("I")
        if not 1 <= count <= 4:
            raise ValueError(f"tensor {name!r} has {count} dimensions (1 to 4 are possible)")
        return count
