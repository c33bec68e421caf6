"""What makes a loaded model fast: module swaps, decided once, and the attention that goes with them.

    attention = optimize(model, quantize="int8", native=True)      # changes the model in place

On a CPU with a C compiler every heavy module runs on the native kernels: bfloat16 weights repacked, or rounded to 8 or 4
bits. Without them (no compiler, another device, float32) the model stays as it is, and quantised weights are unpacked
on the fly. The layers are swapped one after the other and each frees what it replaces, so memory peaks at the model and
one layer.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from octad.errors import RequestError
from octad.fast.native_layer import NativeLayer, Stack
from octad.fast.native_modules import (
    NativeAttention,
    NativeExperts,
    NativeLinear,
    NativeMLP,
    NativeNorm,
    NativeRouter,
    native_attention,
)
from octad.fast.quantize import (
    PackedExperts,
    PackedLinear,
    Precision,
    head_weight,
    held_precision,
    quantize_modules,
)
from octad.kernels.arena import Arena
from octad.kernels.build import BuildError, load
from octad.kernels.native import NativeKernels
from octad.kernels.packed import Packed, pack
from octad.kernels.paged import PagedAttention, paged_attention
from octad.model.moe import MLP, Experts, MoE, Router
from octad.model.transformer import DecoderLayer, Transformer


def optimize(model: Transformer, *, quantize: str | None = None, native: bool = True) -> PagedAttention:
    """Swaps modules of the model in place and returns the attention over pages to run it with. Raises RequestError
    for an unknown `quantize`, or one of another name than the model was saved in; what was saved is run as it is."""
    precision = _precision(model, quantize)
    kernels = native_kernels() if native and suits_native(model, precision) else None
    if kernels is None:
        if precision is not None:
            quantize_modules(model, precision)
        return paged_attention
    with torch.no_grad():
        swap(model, kernels, precision or Precision(16, 16, 16))
    return native_attention(kernels)


def _precision(model: Transformer, quantize: str | None) -> Precision | None:
    asked, held = None if quantize is None else Precision.of(quantize), held_precision(model)
    if asked and held and asked.name != held.name:
        raise RequestError(
            f"quantize: found {asked.name}, but the checkpoint is {held.name} already; leave it out, or give the"
            " checkpoint that this one was made of"
        )
    return held or asked


def suits_native(model: Transformer, precision: Precision | None) -> bool:
    """The kernels read packed weights on the CPU; float32 weights that nobody asked to round stay exact."""
    weight = model.model.norm.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    return precision is not None or weight.dtype == torch.bfloat16


def native_kernels() -> NativeKernels | None:
    """The kernels, where they can be built and the CPU has the instructions that make them worth it."""
    try:
        kernels = NativeKernels(load())
    except BuildError:
        return None
    return kernels if kernels.integer_dot and kernels.bfloat16_dot else None


class Packer:
    """Packs weights into memory that reads fast; what is packed already (on disk) keeps its integers and scales."""

    def __init__(self, bits: int) -> None:
        self.bits, self.arena = bits, Arena()
        self._empty = partial(self.arena.empty, dtype=torch.uint8)

    def one(self, weight: torch.Tensor | Packed) -> Packed:
        """A weight [O, K] alone."""
        if isinstance(weight, Packed):
            return _moved(weight, self.arena.copy(weight.panels))
        return pack(weight.detach(), self.bits, empty=self._empty)

    def pair(self, gate_FD: torch.Tensor | Packed, up_FD: torch.Tensor | Packed) -> tuple[Packed, Packed]:
        """Gate and up projections with their panels taking turns: one pass over memory reads both."""
        gate, up = (w if isinstance(w, Packed) else pack(w.detach(), self.bits) for w in (gate_FD, up_FD))
        panels, size = gate.panels.shape
        both = self.arena.empty((panels, 2, size), torch.uint8)
        return _moved(gate, both[:, 0].copy_(gate.panels)), _moved(up, both[:, 1].copy_(up.panels))


def _moved(weight: Packed, panels: torch.Tensor) -> Packed:
    return Packed(panels, weight.outputs, weight.inputs, weight.bits, weight.group)


def swap(model: Transformer, kernels: NativeKernels, precision: Precision) -> None:
    """Put the native modules in the place of a model's own, layer by layer."""
    attention, ffn, stack = Packer(precision.attention), Packer(precision.ffn), Stack()
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        _swap_parts(layer, kernels, attention, ffn)
        model.model.layers[number] = NativeLayer(kernels, layer, model.config, stack)
    model.model.norm = NativeNorm(kernels, model.model.norm)  # type: ignore[assignment]
    head = model.lm_head.weight if isinstance(model.lm_head, PackedLinear) else head_weight(model)
    model.lm_head = NativeLinear(kernels, head, None, Packer(precision.head).one)


def _swap_parts(layer: DecoderLayer, kernels: NativeKernels, attention: Packer, ffn: Packer) -> None:
    layer.input_layernorm = NativeNorm(kernels, layer.input_layernorm)  # type: ignore[assignment]
    layer.post_attention_layernorm = NativeNorm(kernels, layer.post_attention_layernorm)  # type: ignore[assignment]
    layer.self_attn = NativeAttention(kernels, layer.self_attn, attention.one)  # type: ignore[assignment]
    if isinstance(layer.mlp, MoE):
        _swap_mixture(layer.mlp, kernels, ffn)
    elif isinstance(layer.mlp, MLP):
        layer.mlp = _native_mlp(layer.mlp, kernels, ffn)


def _swap_mixture(moe: MoE, kernels: NativeKernels, packer: Packer) -> None:
    assert isinstance(moe.experts, (Experts, PackedExperts))
    moe.experts = NativeExperts(kernels, moe.experts, packer.pair, packer.one)
    if isinstance(moe.gate, Router):
        moe.gate = NativeRouter(kernels, moe.gate)
    if moe.shared_expert is not None:
        moe.shared_expert = _native_mlp(moe.shared_expert, kernels, packer)  # type: ignore[assignment]


def _native_mlp(mlp: MLP, kernels: NativeKernels, packer: Packer) -> nn.Module:
    """In one call; with biases, which that call does not know, its three products."""
    bias: torch.Tensor | None = mlp.gate_proj.bias
    if bias is None:
        return NativeMLP(kernels, mlp, packer.pair, packer.one)
    for name, child in list(mlp.named_children()):
        setattr(mlp, name, NativeLinear(kernels, child.weight, child.bias, packer.one))  # type: ignore[arg-type]
    return mlp
