"""The contestants inside one loaded mixture: each member, the soup, the mixture at another top-k.

    with contestant(model, Member(3)):      # the same Transformer, every layer sent through expert 3
        window_nats(model, windows)

A member whose only difference from the base is its feed-forward nets *is* the mixture with its router forced to that
expert, when attention is the base's: no second model is loaded. Modules are swapped in and put back. Other members are
loaded one at a time (see originals.py).

Shapes: E experts, F feed-forward hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from octad.checkpoint.load import load_model
from octad.checkpoint.source import TensorSource
from octad.model.moe import MLP, Experts, FixedRouter, MoE, Router
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
    """A member as it was before it joined, which is a model of its own."""

    source: TensorSource


@dataclass(frozen=True)
class TopK:
    """The mixture itself with this many experts per token."""

    k: int


Contestant = Member | Original | Soup | TopK


def moe_layers(model: Transformer) -> list[tuple[nn.Module, MoE]]:
    """(decoder layer, its MoE) of every layer that has one."""
    return [(layer, layer.mlp) for layer in model.model.layers if isinstance(layer.mlp, MoE)]


@contextmanager
def contestant(model: Transformer, who: Contestant | None) -> Iterator[Transformer]:
    """The model as this contestant inside the block (None: as it is), itself again after it; or the original member."""
    if isinstance(who, Original):
        yield load_model(who.source, next(model.parameters()).dtype)
        return
    before = [(layer, moe, moe.gate, getattr(moe.gate, "top_k", 0)) for layer, moe in moe_layers(model)]
    try:
        for layer, moe, gate, _ in before:
            if isinstance(who, Member):
                moe.gate = FixedRouter([who.expert])
            elif isinstance(who, Soup):
                layer.mlp = soup_mlp(moe.experts, who.experts)
            elif isinstance(who, TopK) and isinstance(gate, Router):
                gate.top_k = who.k
        yield model
    finally:
        for layer, moe, gate, top_k in before:
            layer.mlp, moe.gate = moe, gate
            if isinstance(gate, Router):
                gate.top_k = top_k


def soup_mlp(experts: nn.Module, chosen: Sequence[int]) -> MLP:
    """The dense network whose weights are the mean of the chosen experts' (taken in float32)."""
    assert isinstance(experts, Experts)
    index = list(chosen)
    gate_up = experts.gate_up_proj[index].float().mean(0).to(experts.gate_up_proj.dtype)
    down = experts.down_proj[index].float().mean(0).to(experts.down_proj.dtype)
    with torch.device("meta"):
        mlp = MLP(gate_up.shape[1], gate_up.shape[0] // 2)
    gate, up = gate_up.chunk(2)
    weights = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
    mlp.load_state_dict(weights, assign=True)
    return mlp


@dataclass
class Load:
    """How many tokens each expert got: counts_E, one per layer; where `mask` is set, of the tokens it is True for."""

    counts: list[torch.Tensor] = field(default_factory=list)
    mask: torch.Tensor | None = None

    def set_mask(self, mask_BS: torch.Tensor) -> None:
        """Count only the real tokens of the next batch."""
        self.mask = mask_BS.flatten()

    def add(self, count_E: torch.Tensor, experts_NA: torch.Tensor) -> None:
        """One layer's choice for one batch."""
        real = experts_NA.cpu() if self.mask is None else experts_NA.cpu()[self.mask]
        count_E += torch.bincount(real.flatten(), minlength=len(count_E))


@contextmanager
def counted_load(model: Transformer) -> Iterator[Load]:
    """Counts inside the block how many tokens each expert of each layer gets."""
    load, handles = Load(), []
    for _, moe in moe_layers(model):
        count = torch.zeros(moe.gate.weight.shape[0], dtype=torch.long)  # type: ignore[arg-type, index]
        load.counts.append(count)

        def observe(
            module: nn.Module,
            args: tuple[torch.Tensor, ...],
            out: tuple[torch.Tensor, torch.Tensor],
            count: torch.Tensor = count,
        ) -> None:
            load.add(count, out[1])

        handles.append(moe.gate.register_forward_hook(observe))
    try:
        yield load
    finally:
        for handle in handles:
            handle.remove()
