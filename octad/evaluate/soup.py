"""The soup of models that differ in more than their experts: a source whose weights are the mean of others'.

    mean = AveragedSource((open_source("french"), open_source("python")))     # raises CheckpointError: other shapes
    load_model(mean, torch.float32)

Weights are averaged in float32, tensor by tensor, as they are read: no more than two of a tensor are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.load import content_names
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.spans import Span, read_rows
from octad.errors import CheckpointError
from octad.model.config import ModelConfig


@dataclass(frozen=True)
class AveragedSource:
    """A TensorSource. Its side files are the first part's."""

    parts: tuple[TensorSource, ...]

    def __post_init__(self) -> None:
        first = _shapes(self.parts[0])
        for part in self.parts[1:]:
            if _shapes(part) != first:
                raise CheckpointError(
                    f"{part.label}: its tensors are of other shapes than {self.parts[0].label}'s"
                )

    @property
    def label(self) -> str:
        """The parts' labels."""
        return f"the mean of {', '.join(part.label for part in self.parts)}"

    @property
    def config(self) -> ModelConfig:
        """The first part's."""
        return self.parts[0].config

    @property
    def directory(self) -> Path | None:
        """The first part's."""
        return self.parts[0].directory

    def names(self) -> list[str]:
        """The tensors that make up the model."""
        return content_names(self.parts[0])

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(self.parts[0].info(name).shape, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """The mean of the parts' tensors of this name."""
        return mean(part.read(name) for part in self.parts)

    def read_rows(self, span: Span) -> torch.Tensor:
        """The mean of these rows alone."""
        return mean(read_rows(part, span) for part in self.parts)

    def extent(self, name: str) -> None:
        """None: its bytes lie nowhere."""

    def provenance(self) -> Mapping[str, Any]:
        """What identifies it: the parts' files, and those of the bases that adapters change."""
        sources = [s for part in self.parts for s in (part, getattr(part, "base", None)) if s is not None]
        return {"kind": "mean", "label": self.label, "files": [s.provenance().get("files") for s in sources]}


def mean(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """In float32; no more than two of them are in memory."""
    total, count = None, 0
    for tensor in tensors:
        total, count = tensor.float().clone() if total is None else total.add_(tensor), count + 1
    assert total is not None
    return total.div_(count)


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: source.info(name).shape for name in content_names(source)}
