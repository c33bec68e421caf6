"""Sources seen through a lens: each wraps a TensorSource and is one, so that whatever reads sources works on them too.

member = ExpertView(open_source("mixture/"), 3)          # expert 3 with the shared part, the dense model that it is
load_model(member, dtype, device)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.names import dense_mlp_name, expert_name, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.model.config import ModelConfig, dense_config


class View:
    """A source that hands everything on to another one."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    @property
    def label(self) -> str:
        """See TensorSource."""
        return self.source.label

    @property
    def config(self) -> ModelConfig:
        """See TensorSource."""
        return self.source.config

    @property
    def directory(self) -> Path | None:
        """See TensorSource."""
        return self.source.directory

    def names(self) -> list[str]:
        """See TensorSource."""
        return self.source.names()

    def info(self, name: str) -> TensorInfo:
        """See TensorSource."""
        return self.source.info(name)

    def read(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self.source.read(name)

    def extent(self, name: str) -> Extent | None:
        """See TensorSource."""
        return self.source.extent(name)

    def provenance(self) -> Mapping[str, Any]:
        """See TensorSource."""
        return self.source.provenance()


class ExpertView(View):
    """One expert of a mixture, with the shared part, seen as the dense model that it is."""

    def __init__(self, mixture: TensorSource, expert: int) -> None:
        super().__init__(mixture)
        self.expert = expert
        config = mixture.config
        self._names = {
            dense_mlp_name(layer, part): expert_name(config.model_type, layer, expert, part)
            for layer in range(config.num_hidden_layers)
            if layer not in config.dense_layers
            for part in ("gate", "up", "down")
        }

    @property
    def config(self) -> ModelConfig:
        """The dense family that this mixture family is made of."""
        return dense_config(self.source.config)

    def names(self) -> list[str]:
        """The names of the dense model."""
        return list(tensor_plan(self.config))

    def origin(self, name: str) -> str:
        """What the mixture calls this tensor."""
        return self._names.get(name, name)

    def info(self, name: str) -> TensorInfo:
        """See TensorSource."""
        return self.source.info(self.origin(name))

    def read(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self.source.read(self.origin(name))

    def extent(self, name: str) -> Extent | None:
        """See TensorSource."""
        return self.source.extent(self.origin(name))


def shared_expert_adds_nothing(source: TensorSource) -> bool:
    """True where there is a shared expert and its output is zero, as in mixtures made of Qwen2 models."""
    downs = [name for name in tensor_plan(source.config) if name.endswith(".shared_expert.down_proj.weight")]
    return bool(downs) and all(not torch.any(source.read(name)) for name in downs)
