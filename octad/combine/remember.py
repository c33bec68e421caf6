"""A source with a memory of the tensors that it read last."""

from __future__ import annotations

import torch

from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import View


class RememberLast(View):
    """Keeps the tensors it read last, a feed-forward net's three: members that are adapters ask for the same in turn.

    Only where reading costs arithmetic (a GGUF file); what lies on disk as it is stays in the page cache anyway."""

    def __init__(self, source: TensorSource, count: int = 3) -> None:
        super().__init__(source)
        self._count = count
        self._kept: dict[str, torch.Tensor] = {}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, read or remembered; a copy, so that the caller may change it."""
        if self.source.extent(name) is not None:
            return self.source.read(name)
        if name not in self._kept:
            while len(self._kept) >= self._count:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = self.source.read(name)
        return self._kept[name].clone()
