"""How a training run lies on its devices: data x expert x tensor x pipeline.

    Layout(data=2, expert=8).world          # 16: what octad trains itself
    Layout(data=64, tensor=8, pipeline=16).trainer          # "Megatron-Core": octad has no tensor or pipeline parallelism

Expert ranks share the experts of a layer and also split the batch, so that everything else has data x expert replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# what the replicas of a weight divide among them: nothing, masters and moments (ZeRO-1), or everything (FSDP)
Shard = Literal["nothing", "optimizer", "weights"]


@dataclass(frozen=True)
class Layout:
    """Ranks along each dimension; `micro` windows at a time; `recompute`: keep each block's input only."""

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    shard: Shard = "weights"
    micro: int = 1
    recompute: bool = True

    @property
    def world(self) -> int:
        """Devices."""
        return self.data * self.expert * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """How many ranks hold (or share) the same part of what is not an expert, each with its own windows."""
        return self.data * self.expert

    @property
    def trainer(self) -> str:
        """Who trains like this."""
        return "octad" if self.tensor == self.pipeline == 1 and self.shard != "optimizer" else "Megatron-Core"

    def __str__(self) -> str:
        return f"data {self.data} x expert {self.expert} x tensor {self.tensor} x pipeline {self.pipeline}"
