"""The hidden states of the calibration text between two layers: in memory, or where they are many in a temporary file.

    with States(total_bytes) as states:
        number = states.append(h_BSD)
        states[number] = layer(states[number])

They grow with tokens x width, which nothing else in combining does. The file has no name, so that whatever ends the
program ends the file too. It is read and written, not mapped: a mapped file's pages count as resident memory.

Shapes: B sequences, S positions, D model.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch

from octad import portable
from octad.checkpoint.extent import write_all
from octad.errors import OutputError

IN_MEMORY = 256 << 20  # bytes; more go to the temporary directory


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class States:
    """A list of tensors of `total` bytes in all, whose items can be replaced by others of their shape and dtype.

    Raises OutputError where the temporary directory has no room for them."""

    def __init__(self, total: int) -> None:
        self._file = _temporary(total) if total > IN_MEMORY else None
        self._tensors: list[torch.Tensor] = []
        self._places: list[_Place] = []
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors = []
        if self._file is not None:
            self._file.close()

    def append(self, tensor: torch.Tensor) -> int:
        """Its number."""
        if self._file is None:
            self._tensors.append(tensor)
            return len(self._tensors) - 1
        self._places.append(_Place(self._end, tensor.shape, tensor.dtype))
        self._end += tensor.nbytes
        self[len(self._places) - 1] = tensor
        return len(self._places) - 1

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._file is None:
            return self._tensors[number]
        place = self._places[number]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        view, done = _bytes(tensor), 0
        while done < len(view):
            done += portable.read_into(self._file.fileno(), view[done:], place.offset + done)
        return tensor

    def __setitem__(self, number: int, tensor: torch.Tensor) -> None:
        if self._file is None:
            self._tensors[number] = tensor
        else:
            write_all(self._file.fileno(), _bytes(tensor.contiguous()), self._places[number].offset)

    def save(self, path: Path) -> None:
        """All of them, one after another, into a file."""
        with path.open("wb") as file:
            for number in range(len(self)):
                file.write(_bytes(self[number].contiguous()))

    def load(self, path: Path) -> None:
        """What `save` wrote of as many states of these shapes. Raises OutputError for another file."""
        with path.open("rb") as file:
            for number in range(len(self)):
                tensor = torch.empty_like(self[number], memory_format=torch.contiguous_format)
                if file.readinto(_bytes(tensor)) != tensor.nbytes:
                    raise OutputError(f"{path}: is too short; remove {path.parent.parent} and begin anew")
                self[number] = tensor

    def __len__(self) -> int:
        return len(self._places) if self._file is not None else len(self._tensors)


def _temporary(total: int) -> Any:
    """An open file without a name, with room for this many bytes."""
    place = tempfile.gettempdir()
    try:
        file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - States closes it
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)
    except OSError as error:
        raise OutputError(
            f"{place}: {total:,} bytes of calibration states cannot be put there ({error.strerror});"
            " set TMPDIR to another directory, or ask for fewer router tokens"
        ) from error
    return file


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))
