"""A model's weights over the ranks of a run: whole, sharded, experts dealt out. Applied from outside the model.

    spread = Spread(world, device, sharded=True, experts=4)
    spread.spread(model)            # 1. expert parallelism
    whole = spread.shard(model)     # 2. FSDP
    loss = whole(lambda: ...)       # whatever runs in there finds the weights gathered
    whole = spread_model(source, dtype, device, world)      # the same from a checkpoint, to judge with: each reads
    its rows

The ranks form a grid, data x expert: the P ranks of a row share the experts of each layer (E / P each), the ranks of a
column hold the same ones. Everything else is sharded over all ranks, experts over their column; routers are small,
float32 where they train, and whole everywhere. FSDP's hooks hang on the blocks and on `Whole`, so that embeddings, last
norm and head are gathered for the whole of a forward and backward pass, one block for its own part only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from octad import portable
from octad.checkpoint.source import TensorSource
from octad.dist import World
from octad.fast.expert_parallel import experts_of, spread_experts
from octad.fast.grouped_experts import group_experts
from octad.fast.pieces import Piece
from octad.fast.weights import bare_model, fill_from, materialise
from octad.model import cost
from octad.model.config import ModelConfig
from octad.model.moe import MoE
from octad.model.transformer import Transformer

T = TypeVar("T")
EXPERTS = ".mlp.experts."
FULL = 0.5  # of a rank's memory, from which on `auto` spreads weights


class Whole(nn.Module):
    """Runs any function of a model as its forward, so that FSDP's hooks on it surround loss and evaluation alike."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """What the function gives."""
        return work()

    @torch.no_grad()  # not inference_mode, whose tensors FSDP could not use for training again
    def judge(self, work: Callable[[], T]) -> T:
        """The same without a backward pass to come, which would shard embeddings and head again."""
        found: T = self(work)
        if isinstance(self, FSDPModule):
            self.reshard()
        return found


@dataclass
class Spread:
    """`experts` ranks share the experts of a layer; `sharded`: FSDP for the rest."""

    world: World
    device: torch.device
    sharded: bool = False
    experts: int = 1

    @property
    def spreads(self) -> bool:
        """True where no rank can run the model alone."""
        return self.sharded or self.experts > 1

    @cached_property
    def flat(self) -> DeviceMesh:
        """All ranks in a row."""
        return init_device_mesh(self.device.type, (self.world.size,), mesh_dim_names=("all",))

    @cached_property
    def grid(self) -> DeviceMesh:
        """data x expert."""
        shape = (self.world.size // self.experts, self.experts)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "expert"))

    # ---- applied to a model, in this order -----------------------------------------------------------------

    def spread(self, model: Transformer) -> None:
        """Deal the experts out."""
        if self.experts > 1:
            spread_experts(model, self.grid["expert"])

    def shard(self, model: Transformer) -> Whole:
        """Shard everything but routers; returns what to run the model in."""
        whole = Whole(model)
        if not self.sharded:
            return whole
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        left = {p for m in model.modules() if isinstance(m, MoE) for p in m.gate.parameters()}
        if self.experts > 1:
            left |= self._shard_experts(model, policy)
        for layer in model.model.layers:
            fully_shard(
                layer, mesh=self.flat, mp_policy=policy, ignored_params=left, shard_placement_fn=self._cut
            )
        fully_shard(
            whole, mesh=self.flat, mp_policy=policy, ignored_params=left, shard_placement_fn=self._cut
        )
        for module in whole.modules():
            if isinstance(module, FSDPModule):  # the loss is a part of the step's: parts add up
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return whole

    def _shard_experts(self, model: Transformer, policy: MixedPrecisionPolicy) -> set[nn.Parameter]:
        """Each column shards its experts by rows where they divide; else they stay whole, and are returned."""
        data, left = self.grid["data"], set[nn.Parameter]()
        for _, experts in experts_of(model):
            own = list(experts.parameters())
            if data.size() > 1 and all(p.dim() > 1 and p.shape[1] % data.size() == 0 for p in own):
                fully_shard(experts, mesh=data, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
            else:
                left |= set(own)
        return left

    def _cut(self, parameter: nn.Parameter) -> Shard | None:
        """Stacked experts by expert, else by rows, where either divides; everything else by rows."""
        ranks = self.world.size
        if parameter.dim() == 3 and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0:
            return Shard(1)
        return None

    # ---- what came of it -----------------------------------------------------------------------------------

    def pieces(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
        """Where each parameter's local part lies; none for those that are whole on every rank."""
        found = {}
        for name, parameter in parameters.items():
            if self.experts > 1 and EXPERTS in name:
                column: Placement = parameter.placements[0] if isinstance(parameter, DTensor) else Replicate()
                shape = torch.Size([parameter.shape[0] * self.experts, *parameter.shape[1:]])
                found[name] = Piece(self.grid, (column, Shard(0)), shape)
            elif isinstance(parameter, DTensor):
                found[name] = Piece(parameter.device_mesh, tuple(parameter.placements), parameter.shape)
        return found


def spread_model(source: TensorSource, dtype: torch.dtype, device: torch.device, world: World) -> Whole:
    """The source's model in eval mode, over all ranks: as many of them as can share the experts, everything else sharded.
    Every rank reads the rows that it keeps. Raises CheckpointError, on all ranks, for what one of them cannot read."""
    model = bare_model(source.config, dtype)
    if device.type == "cuda":
        group_experts(model)
    experts = math.gcd(source.config.num_experts, world.size) if source.config.is_moe else 1
    spread = Spread(world, device, sharded=True, experts=experts)
    spread.spread(model)
    whole = spread.shard(model)
    pieces = spread.pieces(dict(model.named_parameters()))
    fill, names = fill_from(source), materialise(model, device)
    world.together(lambda: fill(model, names, pieces))
    whole.eval()
    return whole


def crowded(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one rank's memory would be more than half full of the weights alone."""
    return cost.parameters(config) * dtype.itemsize > FULL * rank_memory(device)


def rank_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine by rank."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return portable.memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
