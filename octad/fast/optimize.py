"""What makes a loaded model fast: module swaps, decided once, and the attention that goes with them.

    attention = optimize(model, quantize="int8", native=True)      # changes the model in place

On a CPU with a C compiler every heavy module runs on the native kernels: weights repacked, or rounded to 8 or 4 bits. A
float32 model whose weights all are bfloat16 numbers, as those of most checkpoints are, keeps them in bfloat16: that reads
half the memory, and loses nothing, since they are widened in registers and every product is one of float32. Without the
kernels (no compiler, another device or dtype) the model stays as it is, and quantised weights are unpacked on the fly;
where that is slower than what was asked for, the logger "octad" says so.
The layers are swapped one after the other and each frees what it replaces, so memory peaks at the model and one layer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from octad.errors import RequestError
from octad.fast.native_layer import NativeDecoder, NativeLayer
from octad.fast.native_modules import (
    NativeAttention,
    NativeExperts,
    NativeLinear,
    NativeMLP,
    NativeNorm,
    NativeRouter,
    Weight,
    native_attention,
)
from octad.fast.precision import Precision
from octad.fast.quantize import (
    PackedExperts,
    PackedLinear,
    head_weight,
    held_precision,
    quantize_modules,
)
from octad.kernels.arena import Arena
from octad.kernels.compile import BuildError, load
from octad.kernels.native import NativeKernels
from octad.kernels.packed import Empty, Packed, Placed
from octad.kernels.packing import quick_pack
from octad.kernels.paged import PagedAttention, PagedBatch, paged_attention
from octad.kernels.panels import GROUPS, PANEL, panel_bytes
from octad.kernels.varlen import pages_suit, varlen_paged
from octad.model.moe import MLP, Experts, MoE, Router
from octad.model.transformer import DecoderLayer, Transformer

ExpertWeights = tuple[Iterable[tuple[Weight, Weight]], Iterable[Weight]]  # gates and ups, downs
LOOKED_AT = 1 << 20  # values at a time
LOG = logging.getLogger("octad")


def optimize(model: Transformer, *, quantize: str | None = None, native: bool = True) -> PagedAttention:
    """Swaps modules of the model in place and returns the attention over pages to run it with. Raises RequestError
    for an unknown `quantize`, or one of another name than the model was saved in (what was saved is run as it is), and
    for a model that was given before: its weights are no longer there."""
    if isinstance(model.model, NativeDecoder):
        raise RequestError(
            "this model runs on octad's kernels already, in the place of the weights that it had; give the checkpoint's"
            " directory, or load the model anew (octad.checkpoint.load.load_model)"
        )
    precision = _precision(model, quantize)
    kernels = native_kernels() if native and suits_native(model) else None
    if kernels is None:
        if line := slow_path(model, precision) if native else None:
            LOG.warning(line)
        if precision is not None:
            quantize_modules(model, precision)
        elif model.model.norm.weight.device.type == "cuda":
            from octad.fast.grouped_experts import group_experts

            group_experts(model)
        return paged_on_gpu if model.model.norm.weight.device.type == "cuda" else paged_attention
    with torch.no_grad():
        swap(model, kernels, precision or exact_precision(model))
    return native_attention(kernels)


def paged_on_gpu(
    q_NHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """The signature of paged_attention: one call of PyTorch's flash kernels where they take such queries."""
    attend = varlen_paged if pages_suit(q_NHK) else paged_attention
    return attend(q_NHK, keys, values, batch, window)


def slow_path(model: Transformer, precision: Precision | None) -> str | None:
    """One line where PyTorch does what the native kernels would do faster: why, and what it costs."""
    weight = model.model.norm.weight
    on_cpu = weight.device.type == "cpu"
    why = kernels_or_reason()[1] if suits_native(model) else f"they do not run {_kind(weight)}"
    if precision is not None and weight.device.type == "cuda":
        return (
            f"{precision.name} on a GPU only saves memory: PyTorch unpacks the weights at each product, which takes"
            f" longer than weights that are not rounded; vLLM has kernels for what `octad export MODEL --to"
            f" compressed-tensors --quantize {precision.name}` writes"
        )
    if precision is not None:
        return (
            f"{precision.name} without octad's native kernels saves memory but takes about three times as long as weights"
            f" that are not rounded, since PyTorch unpacks them at each product: {why}"
        )
    if on_cpu and suits_native(model):
        return f"no native kernels, so that a token takes several times as long: {why}"
    return None


def _kind(weight: torch.Tensor) -> str:
    return f"on {weight.device.type}" if weight.device.type != "cpu" else f"in {str(weight.dtype)[6:]}"


def _precision(model: Transformer, quantize: str | None) -> Precision | None:
    return same_or_held(None if quantize is None else Precision.of(quantize), held_precision(model))


def same_or_held(asked: Precision | None, held: Precision | None) -> Precision | None:
    """The precision that a checkpoint holds, else the one asked for. Raises RequestError where they differ."""
    if asked and held and asked.name != held.name:
        raise RequestError(
            f"quantize: found {asked.name}, but the checkpoint is {held.name} already; leave it out, or give the"
            " checkpoint that this one was made of"
        )
    return held or asked


def suits_native(model: Transformer) -> bool:
    """The kernels run on the CPU, with activations in float32 or bfloat16."""
    weight = model.model.norm.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def native_kernels() -> NativeKernels | None:
    """The kernels, built for this machine or from the wheel; None where they cannot be had. On a processor without
    instructions for them they are plain C, still faster than unpacking weights in PyTorch. Raises IsaError."""
    return kernels_or_reason()[0]


def kernels_or_reason() -> tuple[NativeKernels | None, str]:
    """The kernels, or None and why there are none."""
    try:
        return NativeKernels(load()), ""
    except BuildError as error:
        return None, str(error)


def exact_precision(model: Transformer) -> Precision:
    """The fewest bits that hold every weight of the products as it is, 16 (bfloat16) or 32, and activations in the
    model's dtype."""
    bits = 16 if all(map(is_bfloat16, _product_weights(model))) else 32
    return Precision(bits, bits, bits, wide=bits == 16 and model.model.norm.weight.dtype == torch.float32)


def is_bfloat16(weight: torch.Tensor) -> bool:
    """True where every value is a bfloat16 number. Looks at a part at a time, up to the first that is not."""
    if weight.dtype == torch.bfloat16:
        return True
    parts: tuple[torch.Tensor, ...] = torch.split(weight.detach().view(-1), LOOKED_AT)
    return all(torch.equal(part.bfloat16().float(), part) for part in parts)


def _product_weights(model: Transformer) -> Iterator[torch.Tensor]:
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            yield module.weight
        elif isinstance(module, Experts):
            yield from (module.gate_up_proj, module.down_proj)
    yield head_weight(model)


class Packer:
    """Packs weights into memory that reads fast; what is packed already (on disk) keeps its integers and scales."""

    def __init__(self, bits: int, *, wide: bool = False) -> None:
        self.bits, self.wide, self.arena = bits, wide and bits == 16, Arena()
        self._empty = partial(self.arena.empty, dtype=torch.uint8)

    def one(self, weight: torch.Tensor | Packed) -> Packed:
        """A weight [O, K] alone."""
        if isinstance(weight, Placed):
            return weight
        if isinstance(weight, Packed):
            return _moved(weight, self.arena.copy(weight.panels))
        return self._packed(weight, self._empty)

    def pair(self, gate_FD: torch.Tensor | Packed, up_FD: torch.Tensor | Packed) -> tuple[Packed, Packed]:
        """Gate and up projections with their panels taking turns: one pass over memory reads both."""
        if isinstance(gate_FD, Placed) and isinstance(up_FD, Placed):
            return gate_FD, up_FD
        if isinstance(gate_FD, Packed):
            panels, size = gate_FD.panels.shape
        else:
            outputs, inputs = gate_FD.shape
            panels, size = -(-outputs // PANEL), panel_bytes(self.bits, GROUPS[self.bits], inputs)
        both = self.arena.empty((panels, 2, size), torch.uint8)
        return self._into(gate_FD, both[:, 0]), self._into(up_FD, both[:, 1])

    def _into(self, weight: torch.Tensor | Packed, panels: torch.Tensor) -> Packed:
        if isinstance(weight, Packed):
            return _moved(weight, panels.copy_(weight.panels))
        return self._packed(weight, lambda shape: panels)

    def _packed(self, weight: torch.Tensor, empty: Empty) -> Packed:
        return quick_pack(weight.detach(), self.bits, empty=empty, wide=self.wide)


def _moved(weight: Packed, panels: torch.Tensor) -> Packed:
    return replace(weight, panels=panels)


class Swapper:
    """Puts native modules in the place of one model's own, layer by layer, from weights in memory or still on disk."""

    def __init__(self, model: Transformer, kernels: NativeKernels, precision: Precision) -> None:
        self.model, self.kernels, self.precision = model, kernels, precision
        self._packers: dict[int, Packer] = {}

    def layer(self, number: int, experts: ExpertWeights | NativeExperts | None = None) -> None:
        """Swap one layer; `experts` are the weights of its experts where the layer does not hold them itself, or a module
        that has them."""
        layer = self.model.model.layers[number]
        assert isinstance(layer, DecoderLayer)
        pair, down = (self._packer(bits) for bits in self.precision.net(number, len(self.model.model.layers)))
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, NativeNorm(self.kernels, getattr(layer, name)))
        layer.self_attn = NativeAttention(
            self.kernels, layer.self_attn, self._packer(self.precision.attention).one
        )
        if isinstance(layer.mlp, MoE):
            self._mixture(layer.mlp, experts or expert_weights(layer.mlp.experts), pair, down)
        elif isinstance(layer.mlp, MLP):
            layer.mlp = self._mlp(layer.mlp, pair, down)
        self.model.model.layers[number] = NativeLayer(layer, self.model.config)

    def ends(self, head: torch.Tensor | Packed) -> None:
        """Swap the last norm, the decoder around the layers, and the head, whose weight [V, D] is given."""
        decoder, one = self.model.model, Packer(self.precision.head, wide=self.precision.wide).one
        decoder.norm = NativeNorm(self.kernels, decoder.norm)
        self.model.model = NativeDecoder(self.kernels, decoder)
        self.model.lm_head = NativeLinear(self.kernels, head, None, one)

    def _packer(self, bits: int) -> Packer:
        if bits not in self._packers:
            self._packers[bits] = Packer(bits, wide=self.precision.wide)
        return self._packers[bits]

    def _mixture(self, moe: MoE, experts: ExpertWeights | NativeExperts, pair: Packer, down: Packer) -> None:
        if not isinstance(experts, NativeExperts):
            experts = NativeExperts(self.kernels, *experts, pair.pair, down.one)
        moe.experts = experts
        if isinstance(moe.gate, Router):
            moe.gate = NativeRouter(self.kernels, moe.gate)
        if moe.shared_expert is not None:
            moe.shared_expert = self._mlp(moe.shared_expert, pair, down)  # type: ignore[assignment]

    def _mlp(self, mlp: MLP, pair: Packer, down: Packer) -> nn.Module:
        """In one call; with biases, which that call does not know, its three products."""
        bias: torch.Tensor | None = mlp.gate_proj.bias
        if bias is None:
            return NativeMLP(self.kernels, mlp, pair.pair, down.one)
        for name, packer in (("gate_proj", pair), ("up_proj", pair), ("down_proj", down)):
            child = getattr(mlp, name)
            setattr(mlp, name, NativeLinear(self.kernels, child.weight, child.bias, packer.one))
        return mlp


def swap(model: Transformer, kernels: NativeKernels, precision: Precision) -> None:
    """Put the native modules in the place of a model's own, each layer freeing what it replaces."""
    swapper = Swapper(model, kernels, precision)
    for number in range(len(model.model.layers)):
        swapper.layer(number)
    swapper.ends(model.lm_head.weight if isinstance(model.lm_head, PackedLinear) else head_weight(model))


def expert_weights(experts: nn.Module) -> ExpertWeights:
    """One expert's gate and up projections after the other's, and likewise the down projections."""
    if isinstance(experts, PackedExperts):
        return zip(experts.gate, experts.up, strict=True), experts.down
    assert isinstance(experts, Experts)
    halves = (weight.chunk(2) for weight in experts.gate_up_proj)
    return ((gate, up) for gate, up in halves), experts.down_proj
