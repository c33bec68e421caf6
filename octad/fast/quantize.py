"""Weight-only quantisation by module swap: linear layers, experts and head in 8 or 4 bits, everything else as it was.

    precision = Precision.of("int4")           # precision.py says what has 4 bits, and what 8
    quantize_modules(model, precision)          # PyTorch modules that unpack on the fly: any device, less memory

The embeddings stay as they are (a token reads one row of them) and give the head its quantised twin where the two are
tied. Routers and norms are small and stay too: a router's choice is worth more than its bytes. Attention, which all
experts share, and the head keep 8: of a mixture's bytes they are a small part, of what rounding costs a large one.

A checkpoint that was saved quantised (saved.py) comes with these modules in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.precision import Precision
from octad.kernels.packed import Packed, linear
from octad.kernels.packing import quick_pack
from octad.model.moe import MLP, Experts, MoE
from octad.model.transformer import DecoderLayer, Transformer


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight, unpacked for each product."""

    def __init__(self, weight: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, layer: nn.Linear, bits: int) -> PackedLinear:
        """A layer with its weight rounded."""
        return cls(quick_pack(layer.weight.detach(), bits), layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., O] of x [..., K]."""
        y = linear(x.reshape(-1, self.weight.inputs), self.weight)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1)


class PackedExperts(nn.Module):
    """Experts with packed weights: one expert is unpacked at a time, and only if a token chose it."""

    def __init__(self, gate: Sequence[Packed], up: Sequence[Packed], down: Sequence[Packed]) -> None:
        super().__init__()
        self.gate, self.up, self.down = list(gate), list(up), list(down)

    @classmethod
    def of(cls, experts: Experts, bits: tuple[int, int]) -> PackedExperts:
        """Experts with their weights rounded, gate and up to the one number of bits, down to the other."""
        gates, ups, downs = [], [], []
        for gate_up, down in zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True):
            gate, up = gate_up.chunk(2)
            gates.append(quick_pack(gate, bits[0]))
            ups.append(quick_pack(up, bits[0]))
            downs.append(quick_pack(down, bits[1]))
        return cls(gates, ups, downs)

    def expert(self, e: int, x_ND: torch.Tensor) -> torch.Tensor:
        """One expert's output y_ND."""
        return linear(F.silu(linear(x_ND, self.gate[e])) * linear(x_ND, self.up[e]), self.down[e])

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """As Experts.forward."""
        return Experts.forward(cast(Experts, self), x_ND, weights_NA, experts_NA)


def quantize_modules(model: Transformer, precision: Precision) -> None:
    """Swap every linear layer, every stack of experts and the head in place, but for those that are packed already."""
    layers = model.model.layers
    for number, layer in enumerate(layers):
        assert isinstance(layer, DecoderLayer)
        swap_linears(layer.self_attn, precision.attention)
        _swap_nets(layer.mlp, precision.net(number, len(layers)))
    if not isinstance(model.lm_head, PackedLinear):
        model.lm_head = PackedLinear(quick_pack(head_weight(model).detach(), precision.head))


def _swap_nets(mlp: nn.Module, bits: tuple[int, int]) -> None:
    if isinstance(mlp, MLP):
        _swap_net(mlp, bits)
    if isinstance(mlp, MoE) and isinstance(mlp.experts, Experts):
        mlp.experts = PackedExperts.of(mlp.experts, bits)
    if isinstance(mlp, MoE) and mlp.shared_expert is not None:
        _swap_net(mlp.shared_expert, bits)


def _swap_net(mlp: MLP, bits: tuple[int, int]) -> None:
    for name, own in (("gate_proj", bits[0]), ("up_proj", bits[0]), ("down_proj", bits[1])):
        if isinstance(child := getattr(mlp, name), nn.Linear):
            setattr(mlp, name, PackedLinear.of(child, own))


def swap_linears(module: nn.Module, bits: int) -> None:
    """Round the linear layers right inside a module, but for those that are packed already."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear.of(child, bits))


def head_weight(model: Transformer) -> torch.Tensor:
    """The head's weight [V, D]: its own, or the embeddings'."""
    own = model.lm_head
    weight = own.weight if isinstance(own, nn.Linear) else model.model.embed_tokens.weight
    return weight


def held_precision(model: Transformer) -> Precision | None:
    """That of a model which was loaded with packed weights, else None."""
    attention: set[int] = set()
    ffn: set[int] = set()
    for name, module in model.model.named_modules():
        if isinstance(module, PackedLinear):
            (attention if ".self_attn." in name else ffn).add(module.weight.bits)
        if isinstance(module, PackedExperts):
            ffn |= {weight.bits for weight in (*module.gate, *module.down)}
    return Precision(min(ffn), min(attention), 8, spare=len(ffn) > 1) if ffn and attention else None
