"""How a run's weights lie on its ranks while they learn: decided once, applied from outside the model.

    layout = Layout.decide(spec, world, model, device)
    layout.spread(model)            # 1. expert parallelism
    ...                             # 2. activation checkpointing, 3. compilation: the trainer's
    whole = layout.shard(model)     # 4. FSDP
    loss = whole(lambda: ...)       # whatever runs in there finds the weights gathered

How they can lie is fast/spread.py's; here is what training adds: who decides, whose gradients have to be added up,
how long the whole gradient is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
import torch.distributed as dist
from torch import nn

from octad.dist import World
from octad.errors import RecipeError
from octad.fast.pieces import Piece
from octad.fast.spread import FULL, Spread, rank_memory
from octad.model.cost import OPTIMIZER_BYTES
from octad.model.transformer import Transformer
from octad.train.sections import ParallelSpec

if TYPE_CHECKING:
    from octad.train.optim import Optimizer


@dataclass
class Layout(Spread):
    """A Spread of weights that learn."""

    @classmethod
    def decide(cls, spec: ParallelSpec, world: World, model: Transformer, device: torch.device) -> Self:
        """Raises RecipeError where ranks or experts cannot be dealt out evenly."""
        if world.size == 1:
            return cls(world, device)
        crowded = training_bytes(model) > FULL * rank_memory(device)
        count = model.config.num_experts if model.config.is_moe else 1
        together = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        experts = spec.expert
        if experts == "auto":
            experts = math.gcd(count, together) if crowded else 1
        if count % experts or world.size % experts:
            raise RecipeError(
                f"parallel.expert: {experts} does not divide {count} experts and {world.size} processes; "
                f"{math.gcd(count, world.size)} would"
            )
        return cls(world, device, crowded if spec.shard == "auto" else spec.shard, experts)

    def __str__(self) -> str:
        weights = "weights sharded" if self.sharded else "all weights on each"
        return f"{self.world.size} processes: {weights}" + (
            f", experts dealt out over {self.experts}" if self.experts > 1 else ""
        )

    # ---- what the optimiser has to know --------------------------------------------------------------------

    def groups(
        self, pieces: Mapping[str, Piece], names: Iterable[str]
    ) -> dict[str, dist.ProcessGroup | None]:
        """Of the parameters whose gradients have to be added up: over which ranks (None: all). FSDP adds up its own."""
        if self.world.size == 1:
            return {}
        found: dict[str, dist.ProcessGroup | None] = {}
        for name in names:
            piece = pieces.get(name)
            if piece is None:
                found[name] = None
            elif piece.copies > 1:
                found[name] = self.grid["data"].get_group()
        return found

    def norm(self, optimizer: Optimizer) -> float:
        """The length of the whole gradient, the same on every rank; not finite where any of it is not."""
        if not self.spreads:
            return optimizer.norm()
        total = torch.zeros((), dtype=torch.float64)
        for name, gradient in optimizer.named_gradients():
            piece = optimizer.pieces.get(name)
            copies = piece.copies if piece else self.world.size
            total += gradient.norm().double().cpu() ** 2 / copies
        return math.sqrt(self.world.total(float(total)))


def training_bytes(model: nn.Module) -> int:
    """Weights, and a float32 master, gradient and two moments of each that learns."""
    return sum(p.nbytes + (OPTIMIZER_BYTES * p.numel() if p.requires_grad else 0) for p in model.parameters())
