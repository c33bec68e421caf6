"""The contestants inside one loaded mixture: each member, the soup, the mixture at another top-k.

    model = fast_model(source)              # on the engine's native modules, where there are some
    with contestant(model, Member(3)):      # the same Transformer, every layer sent through expert 3
        token_nats(model, windows)

A member whose only difference from the base is its feed-forward nets *is* the mixture with its router forced to that
expert, when attention is the base's: no second model is loaded. Modules are swapped in and put back. Other members are
loaded one at a time (see checkpoint/originals.py).

Shapes: E experts, F feed-forward hidden, L layers, G groups of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from octad.checkpoint.source import TensorSource
from octad.fast.loading import open_fast
from octad.fast.native_modules import NativeExperts, NativeMLP
from octad.fast.optimize import Packer
from octad.fast.quantize import PackedExperts
from octad.kernels.native import PACKED, WIDE, WeightArray
from octad.kernels.packed import Packed
from octad.model.moe import MLP, Experts, FixedRouter, MoE
from octad.model.observe import mixtures, watching
from octad.model.transformer import Transformer


@dataclass(frozen=True)
class Member:
    """Every token through one expert."""

    expert: int


@dataclass(frozen=True)
class Soup:
    """One dense model: the mean of these experts' weights."""

    experts: tuple[int, ...]


@dataclass(frozen=True)
class Original:
    """A model of its own: a member as it was before it joined, or a dense one to compare with."""

    source: TensorSource


@dataclass(frozen=True)
class TopK:
    """The mixture itself with this many experts per token."""

    k: int


@dataclass(frozen=True)
class Whole:
    """The model as it is: a dense one."""


Contestant = Member | Original | Soup | TopK | Whole


def fast_model(
    source: TensorSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> Transformer:
    """The source's model on the fast modules of the engine, rounded as `quantize` says; a quantised checkpoint with the
    weights that it holds."""
    return open_fast(source, dtype, device, quantize=quantize)[0]


def moe_layers(model: Transformer) -> list[tuple[nn.Module, MoE]]:
    """(decoder layer, its MoE) of every layer that has one."""
    return [(layer, layer.mlp) for layer in model.model.layers if isinstance(layer.mlp, MoE)]


@contextmanager
def contestant(model: Transformer, who: Contestant) -> Iterator[Transformer]:
    """The model as this contestant inside the block, itself again after it. An Original is a model of its own: no other
    can become it."""
    assert not isinstance(who, Original)
    before: list[tuple[Any, MoE, nn.Module, int | None]] = [
        (layer, moe, moe.gate, getattr(moe.gate, "top_k", None)) for layer, moe in moe_layers(model)
    ]
    try:
        for layer, moe, gate, top_k in before:
            if isinstance(who, Member):
                moe.gate = FixedRouter([who.expert])
            elif isinstance(who, Soup):
                layer.mlp = soup_mlp(moe.experts, who.experts, model.model.norm.weight.dtype)
            elif isinstance(who, TopK) and top_k is not None:
                gate.top_k = who.k  # type: ignore[assignment]
        yield model
    finally:
        for layer, moe, gate, top_k in before:
            layer.mlp, moe.gate = moe, gate
            if top_k is not None:
                gate.top_k = top_k  # type: ignore[assignment]


def soup_mlp(experts: nn.Module, chosen: Sequence[int], dtype: torch.dtype) -> nn.Module:
    """The dense network whose weights are the mean of the chosen experts' (taken in float32), as fast as they are."""
    parts = [expert_weights(experts, e) for e in chosen]
    gate, up, down = (torch.stack(weights).mean(0) for weights in zip(*parts, strict=True))
    with torch.device("meta"):
        mlp = MLP(gate.shape[1], gate.shape[0])
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    mlp.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    if not isinstance(experts, NativeExperts):
        return mlp
    bits = bits_of(experts.gate)
    packer = Packer(bits if bits < 16 else (32 if dtype == torch.float32 else 16))
    return NativeMLP(experts.kernels, mlp, packer.pair, packer.one)


def expert_weights(experts: nn.Module, e: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate [F, D], up [F, D] and down [D, F] of one expert in float32, whatever holds them."""
    if isinstance(experts, Experts):
        gate, up = experts.gate_up_proj[e].float().chunk(2)
        return gate, up, experts.down_proj[e].float()
    if isinstance(experts, PackedExperts):
        return experts.gate[e].unpack(), experts.up[e].unpack(), experts.down[e].unpack()
    assert isinstance(experts, NativeExperts)
    return unpacked(experts.gate, e), unpacked(experts.up, e), unpacked(experts.down, e)


def unpacked(weights: WeightArray, e: int) -> torch.Tensor:
    """One weight of those described for the native kernels, in float32."""
    struct, data = weights.structs[e], weights.tensors[e]
    if data.dtype.is_floating_point:
        return data.float()
    return Packed(data, int(struct.outputs), int(struct.inputs), bits_of(weights), int(struct.group)).unpack()


def bits_of(weights: WeightArray) -> int:
    """Of weights that are packed for the native kernels."""
    held = weights.structs[0].format
    return 16 if held == WIDE else next(bits for bits, format_ in PACKED.items() if format_ == held)


@dataclass
class Load:
    """How many tokens of each group of text each expert got: counts [G, E], one a layer. `groups_N` are the groups of the
    tokens of the batch that comes next, -1 for those that do not count."""

    groups: int = 1
    counts: list[torch.Tensor] = field(default_factory=list)
    groups_N: torch.Tensor | None = None

    def add(self, count_GE: torch.Tensor, experts_NA: torch.Tensor) -> None:
        """One layer's choice for one batch."""
        groups_N = torch.zeros(len(experts_NA), dtype=torch.long) if self.groups_N is None else self.groups_N
        E = count_GE.shape[1]
        places = (groups_N[:, None] * E + experts_NA.cpu())[groups_N >= 0].flatten()
        count_GE += torch.bincount(places, minlength=count_GE.numel()).view_as(count_GE)


@contextmanager
def counted_load(model: Transformer, groups: int = 1) -> Iterator[Load]:
    """Counts inside the block how many tokens each expert of each layer gets."""
    load, layers = Load(groups), mixtures(model)
    load.counts = [torch.zeros(groups, len(moe.gate.weight), dtype=torch.long) for moe in layers.values()]
    counts = dict(zip(layers, load.counts, strict=True))

    def hear(layer: int, gate: Any, x_ND: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        load.add(counts[layer], experts)

    with watching(model, hear):
        yield load
