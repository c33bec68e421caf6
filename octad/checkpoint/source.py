"""TensorSource: the one shape in which the rest of octad sees weights, wherever they come from.

A source names its tensors as the public checkpoints of its family do (`model.layers.3.mlp.up_proj.weight`,
`model.layers.3.block_sparse_moe.experts.5.w1.weight`), tells shape and dtype without reading, and reads one tensor at a
time. A safetensors directory, a GGUF file and "a base with an adapter on top" are three implementations; combine,
inspect and load know none of them by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from octad.model.config import ModelConfig

if TYPE_CHECKING:
    from octad.checkpoint.extent import Extent


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory and in a safetensors file."""
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """Weights of one model, read lazily. Names are the hub's; a missing name raises CheckpointError."""

    @property
    def label(self) -> str:
        """What the user called it: a path, a hub id, or the name of a bundled base."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""

    @property
    def directory(self) -> Path | None:
        """Where its side files (tokenizer, generation config, provenance) lie; None for a single-file source."""

    def names(self) -> list[str]:
        """All tensor names, in the order in which they lie on disk."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, without reading the data."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU, in memory of its own (safe to change), in the dtype that `info` tells."""

    def extent(self, name: str) -> Extent | None:
        """Where its bytes lie on disk just as `read` gives them, to copy from file to file; None where they do not."""

    def provenance(self) -> Mapping[str, Any]:
        """What identifies it: kind, label, and the size and digest of each file (read once, then remembered)."""
