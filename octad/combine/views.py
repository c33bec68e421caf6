"""Sources seen through a lens while combining: a memory of the last tensor, a copy written on the way.

Each wraps a TensorSource and is one, so that the loops of combine work on all of them alike.
"""

from __future__ import annotations

import torch

from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import View
from octad.checkpoint.writer import CheckpointWriter


class RememberLast(View):
    """Keeps the tensors it read last, a feed-forward net's three: members that are adapters ask for the same in turn.

    Only where reading costs arithmetic (a GGUF file); what lies on disk as it is stays in the page cache anyway."""

    def __init__(self, source: TensorSource, count: int = 3) -> None:
        super().__init__(source)
        self._count = count
        self._kept: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """See TensorSource; a copy, so that the caller may change it."""
        if self.source.extent(name) is not None:
            return self.source.read(name)
        if name not in self._kept:
            while len(self._kept) >= self._count:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self.source.read(name)
        return self._kept[name].clone()


class WriteThrough(View):
    """Everything read is also written to the checkpoint in the making: weights are read once, for both."""

    def __init__(self, source: TensorSource, writer: CheckpointWriter) -> None:
        super().__init__(source)
        self.writer = writer
        self.written: set[str] = set()

    def read(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        tensor = self.source.read(name)
        if name not in self.written:
            self.writer.write(name, tensor)
            self.written.add(name)
        return tensor
