"""The bytes of weights that decoding must read, counted in the model's real modules; `octad.model.cost` counts by config.

    weights = WeightBytes.of(model)               # of the modules really in place: quantised, scales included
    weights.step(distinct=2) + kv                 # bytes that one decoding step must read

Decoding a batch reads an expert once, however many of the batch's tokens chose it: `distinct` is the number of different
experts that a step uses in a layer, from top_k (one user) to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from octad.model.transformer import Transformer

Extent = tuple[int, int]  # addresses, the last one not included


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights in memory: `always` is read at every step (attention, norms, routers, dense layers,
    head), `experts` are all experts of all layers, `idle` is only held: embeddings that are looked up row by row."""

    always: int
    experts: int
    idle: int
    num_experts: int

    @property
    def total(self) -> int:
        """All bytes held."""
        return self.always + self.experts + self.idle

    def step(self, distinct: float) -> float:
        """Bytes read by one step that uses `distinct` different experts in each layer."""
        return self.always + (self.experts * distinct / self.num_experts if self.num_experts else 0)

    @classmethod
    def of(cls, model: Transformer) -> WeightBytes:
        """Count the memory behind the modules in place, each byte once: tensors may share some of it (a tied head, panels
        that lie alternately). Tables of the rotary embedding are not weights."""
        extents: dict[str, list[Extent]] = {"always": [], "experts": [], "idle": []}
        for name, module in model.named_modules():
            if not name.startswith("model.rope"):
                found = [e for tensor in own_tensors(module) for e in extents_of(tensor)]
                extents[_kind(name, model)] += found
        counts, so_far = {}, list[Extent]()
        for kind, found in extents.items():
            before = covered(so_far)
            so_far += found
            counts[kind] = covered(so_far) - before
        return cls(**counts, num_experts=model.config.num_experts)


def extents_of(tensor: torch.Tensor) -> list[Extent]:
    """Where a tensor's values lie: one extent, or one a row where its rows do not follow each other."""
    if tensor.is_contiguous() or tensor.dim() == 0:
        return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)]
    return [extent for row in tensor.unbind() for extent in extents_of(row)]


def covered(extents: list[Extent]) -> int:
    """Bytes in the union of extents."""
    total = end = 0
    for first, last in sorted(extents):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The tensors of the module itself, not of those inside it: parameters, buffers, and plain attributes that hold
    tensors (quantised weights keep values and scales in one object)."""
    plain = [value for name, value in vars(module).items() if name not in vars(nn.Module())]
    return [*module.parameters(recurse=False), *module.buffers(recurse=False), *_tensors_in(plain)]


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors_in(part)]
    if is_dataclass(value) and not isinstance(value, type):
        return [tensor for field in fields(value) for tensor in _tensors_in(getattr(value, field.name))]
    return []


def _kind(name: str, model: Transformer) -> str:
    if ".mlp.experts" in name:
        return "experts"
    if name.startswith("model.embed_tokens") and model.lm_head is not None:
        return "idle"
    return "always"
