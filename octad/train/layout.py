"""How a run's weights lie on its ranks: whole, sharded, experts dealt out. Decided once, applied from outside the model.

    layout = Layout.decide(spec, world, model, device)
    layout.spread(model)            # 1. expert parallelism
    ...                             # 2. activation checkpointing, 3. compilation: the trainer's
    whole = layout.shard(model)     # 4. FSDP
    loss = whole(lambda: ...)       # whatever runs in there finds the weights gathered

The ranks form a grid, data x expert: the P ranks of a row share the experts of each layer (E / P each), the ranks of a
column hold the same ones. Everything else is sharded over all ranks, experts over their column; routers are small,
float32, and whole everywhere. FSDP's hooks hang on the blocks and on `Whole`, so that embeddings, last norm and head
are gathered for the whole of a forward and backward pass, one block for its own part only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from octad import portable
from octad.dist import World
from octad.errors import RecipeError
from octad.model.cost import OPTIMIZER_BYTES
from octad.model.moe import MoE
from octad.model.transformer import Transformer
from octad.train.expert_parallel import experts_of, spread_experts
from octad.train.pieces import Piece
from octad.train.sections import ParallelSpec

if TYPE_CHECKING:
    from octad.train.optim import Optimizer

T = TypeVar("T")
EXPERTS = ".mlp.experts."
BUCKET = 32 << 20  # bytes of gradients that are added up over the ranks as one
FULL = 0.5  # of a rank's memory, from which on `auto` spreads weights


class Whole(nn.Module):
    """Runs any function of a model as its forward, so that FSDP's hooks on it surround loss and evaluation alike."""

    def __init__(self, model: nn.Module) -> None:
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
class Layout:
    """`experts` ranks share the experts of a layer; `sharded`: FSDP for the rest."""

    world: World
    device: torch.device
    sharded: bool = False
    experts: int = 1

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

    @property
    def spreads(self) -> bool:
        """True where no rank can run the model alone."""
        return self.sharded or self.experts > 1

    def __str__(self) -> str:
        weights = "weights sharded" if self.sharded else "all weights on each"
        return f"{self.world.size} processes: {weights}" + (
            f", experts dealt out over {self.experts}" if self.experts > 1 else ""
        )

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

    # ---- what the optimiser has to know --------------------------------------------------------------------

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

    def add_up(self, optimizer: Optimizer) -> None:
        """Gradients over the ranks that hold the same part; FSDP has added up its own."""
        if self.world.size == 1:
            return
        everywhere, column = list[torch.Tensor](), list[torch.Tensor]()
        for name, gradient in optimizer.named_gradients():
            piece = optimizer.pieces.get(name)
            if piece is None:
                everywhere.append(gradient)
            elif piece.copies > 1:
                column.append(gradient)
        add_up_together(everywhere, None)
        if column:
            add_up_together(column, self.grid["data"].get_group())

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


def add_up_together(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """The sum of each over a group's ranks, in place: many small ones travel as one, while the next are put together."""
    travelling = []
    for bucket in buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) if len(bucket) > 1 else bucket[0]
        travelling.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in travelling:
        work.wait()
        if len(bucket) > 1:
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def buckets(gradients: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Runs of neighbours of about BUCKET bytes; what is larger travels alone."""
    bucket, size = list[torch.Tensor](), 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


def training_bytes(model: nn.Module) -> int:
    """Weights, and a float32 master, gradient and two moments of each that learns."""
    return sum(p.nbytes + (OPTIMIZER_BYTES * p.numel() if p.requires_grad else 0) for p in model.parameters())


def rank_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine by rank."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return portable.memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
