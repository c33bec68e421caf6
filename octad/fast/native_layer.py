"""Decoder layers that decode in one call, and otherwise are the composition of their parts.

    stack = []                                        # of one model
    model.model.layers[i] = NativeLayer(kernels, layer, config, stack)      # its parts are native modules already

Between the weights' reading, a token's layer is some twenty small operations, and handing over from Python to the kernel
costs as much as several of them. So for a step in which every sequence has one new token (decoding) the first layer runs
all that follow it in one call, and these find their work done; prompts, calls without pages, and shapes that the kernel
does not know go through the parts, which also are its slow twin. Both give the same bits, so what a sequence says does
not depend on whether another one's prompt is in the same step.

Shapes: R sequences, D model, L layers of a call, A experts a token.
"""

from __future__ import annotations

import ctypes
import weakref
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.native_modules import NativeAttention, NativeExperts, NativeMLP, NativeRouter
from octad.kernels.calls import DTYPES
from octad.kernels.native import BlockStruct, LayerArray, NativeKernels, StepStruct
from octad.model.cache import KVCache
from octad.model.config import ModelConfig
from octad.model.moe import FixedRouter, MoE
from octad.model.observe import Watch
from octad.model.paged_cache import BlockPool, PagedCache
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer

Stack = list["weakref.ref[NativeLayer]"]  # weak: a model must not hold itself


class NativeLayer(nn.Module):
    """DecoderLayer, with the same children under the same names. `stack` collects the layers of one model, in order."""

    def __init__(
        self,
        kernels: NativeKernels,
        layer: DecoderLayer,
        config: ModelConfig,
        stack: Stack | None = None,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.layer = layer.self_attn.layer
        self._struct = block_struct(layer, config)
        self._block = None if self._struct is None else ctypes.addressof(self._struct)
        self._mlp = (
            layer.mlp,
        )  # nn.Module looks its children up slowly, and this one is looked up in every step
        self._stack: Stack = [] if stack is None else stack
        self._place = len(self._stack)
        self._stack.append(weakref.ref(self))
        self._arrays: dict[int, tuple[BlockPool, LayerArray]] = {}

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """As DecoderLayer.forward."""
        if isinstance(cache, PagedCache) and cache.decoding:
            # what the last call made, and the layer behind its last one
            done: tuple[torch.Tensor, int] | None = cache.batch.memo.get("decoded")
            if done is not None and done[0] is x_BSD and self._place < done[1]:
                return x_BSD
            barred = cache.watch is not None and cache.watch.bias_NE is not None
            if self.fused and not (barred and cache.watch.alone_N is None):  # type: ignore[union-attr]
                return self.decode(x_BSD, rope, cache)
        h_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, cache)
        out: torch.Tensor = h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))
        return out

    @property
    def fused(self) -> bool:
        """Whether one call does it: the kernel knows the layer, and how it routes (as its own, or without looking)."""
        return self.routing is not None

    @property
    def routing(self) -> tuple[str, int] | None:
        """How one call routes here, and to how many experts a token; None where it cannot. Layers that answer alike have
        the same shapes, too."""
        if self._block is None:
            return None
        gate = self.router
        if isinstance(gate, NativeRouter):
            return "routed", gate.top_k
        if gate is None:
            return "dense", 1
        return ("given", len(gate.experts)) if isinstance(gate, FixedRouter) else None

    @property
    def router(self) -> nn.Module | None:
        """The router that is in place now; None for a dense layer."""
        mlp = self._mlp[0]
        return mlp._modules["gate"] if isinstance(mlp, MoE) else None

    def decode(self, x_1RD: torch.Tensor, rope: Rope, cache: PagedCache) -> torch.Tensor:
        """This layer and those behind it that route alike, for one new token of each sequence."""
        routing, behind = self.routing, (layer() for layer in self._stack[self._place :])
        assert routing is not None
        watch = cache.watch
        alone_R = watch.alone_N if watch is not None and routing[0] == "routed" else None
        given, top_k = routing[0] != "routed" or alone_R is not None, 1 if alone_R is not None else routing[1]
        layers = [
            layer
            for layer in takewhile(lambda one: one is not None and one.routing == routing, behind)
            if layer
        ]
        shape = (len(layers), x_1RD.shape[1], top_k)
        weights_LRA, experts_LRA = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        if alone_R is not None:
            weights_LRA.fill_(1.0)
            experts_LRA[:] = alone_R[:, None]
        elif given:
            _fill_in(layers, x_1RD[0], weights_LRA, experts_LRA)
        step = _step(cache, rope, x_1RD, given)
        array = self._array(layers, cache.pool)
        y = self.kernels.layers(array, step, x_1RD, weights_LRA, experts_LRA)
        cache.batch.memo["decoded"] = y, self._place + len(layers)
        if alone_R is not None:  # as wide as the routers' own answers; what is left over weighs nothing
            missing = routing[1] - 1
            weights_LRA, experts_LRA = (
                F.pad(weights_LRA, (0, missing)),
                experts_LRA.expand(-1, -1, routing[1]),
            )
        if routing[0] == "routed":
            _tell_observers(layers, x_1RD, weights_LRA, experts_LRA, watch)
        return y

    def _array(self, layers: list[NativeLayer], pool: BlockPool) -> LayerArray:
        """The layers as the kernel takes them, made once."""
        held = self._arrays.get(len(layers))
        if held is None or held[0] is not pool:
            numbers = [layer.layer for layer in layers]
            blocks = [layer._block for layer in layers if layer._block is not None]
            keys, values = [pool.keys[n] for n in numbers], [pool.values[n] for n in numbers]
            held = self._arrays[len(layers)] = pool, LayerArray.of(blocks, keys, values)
        return held[1]


def _fill_in(
    layers: list[NativeLayer], x_RD: torch.Tensor, weights_LRA: torch.Tensor, experts_LRA: torch.Tensor
) -> None:
    """What fixed routers answer, and the only expert of dense layers."""
    weights_LRA.fill_(1.0)
    experts_LRA.zero_()
    for number, layer in enumerate(layers):
        if layer.router is not None:
            weights_LRA[number], experts_LRA[number] = layer.router(x_RD)


def _tell_observers(
    layers: list[NativeLayer],
    x_1RD: torch.Tensor,
    weights_LRA: torch.Tensor,
    experts_LRA: torch.Tensor,
    watch: Watch | None,
) -> None:
    """What calling the routers would have told their hooks; the engine's own hears it all at once."""
    if watch is not None:
        watch.hear([layer.layer for layer in layers], weights_LRA, experts_LRA)
    for number, layer in enumerate(layers):
        gate: Any = layer.router
        for hook in gate._forward_hooks.values():
            if getattr(hook, "steps", False) and watch is not None:
                continue
            hook(gate, (x_1RD,), (weights_LRA[number], experts_LRA[number]))


def block_struct(layer: DecoderLayer, config: ModelConfig) -> BlockStruct | None:
    """The layer as the kernel takes it, or None where it has something that the kernel does not know."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    experts: Any = mlp.experts if isinstance(mlp, MoE) else mlp
    known = isinstance(attention, NativeAttention) and isinstance(experts, (NativeExperts, NativeMLP))
    shared = isinstance(mlp, MoE) and mlp.shared_expert is not None
    if not known or shared or config.qk_norm == "full" or config.clip_qkv is not None:
        return None
    block = BlockStruct(
        qkv=attention.qkv.address,
        o=attention.o.address,
        gate=experts.gate.address,
        up=experts.up.address,
        down=experts.down.address,
        input_norm=layer.input_layernorm.weight.data_ptr(),
        post_norm=layer.post_attention_layernorm.weight.data_ptr(),
        E=len(experts.gate.outputs),
        normalise=config.norm_topk_prob,
        D=config.hidden_size,
        H=config.num_attention_heads,
        G=config.num_key_value_heads,
        K=config.head_dim,
        window=attention.window or 0,
        norm_eps=config.rms_norm_eps,
        head_eps=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
    )
    _add_options(block, attention, mlp)
    return block


def _add_options(block: BlockStruct, attention: Any, mlp: Any) -> None:
    """What only some families have: biases, head norms, a router."""
    if attention.biases is not None:
        for name, bias in zip(("q_bias", "k_bias", "v_bias"), attention.biases, strict=True):
            setattr(block, name, bias.data_ptr())
    if attention.o_bias is not None:
        block.o_bias = attention.o_bias[0].data_ptr()
    if attention.q_norm is not None:
        block.q_norm, block.k_norm = attention.q_norm.weight.data_ptr(), attention.k_norm.weight.data_ptr()
    if isinstance(mlp, MoE) and isinstance(mlp.gate, NativeRouter):
        block.router = mlp.gate.weight.data_ptr()


def _step(cache: PagedCache, rope: Rope, x: torch.Tensor, given: bool) -> int:
    """The address of the step's struct, made once for all layers."""
    memo = cache.batch.memo
    if ("native step", given) not in memo:
        memo["native step", given] = _step_struct(cache, rope, x, given)
    step: int = ctypes.addressof(memo["native step", given])
    return step


def _step_struct(cache: PagedCache, rope: Rope, x: torch.Tensor, given: bool) -> StepStruct:
    start, batch = cache.start, cache.batch
    first = start if isinstance(start, int) else 0
    cos, sin = rope.tables(first + 1, x.device)
    return StepStruct(
        dtype=DTYPES[x.dtype],
        R=len(batch.queries),
        width=batch.block_tables.shape[1],
        block_size=cache.pool.keys[0].shape[1],
        start=first,
        given=given,
        positions=start.data_ptr() if isinstance(start, torch.Tensor) else None,
        slots=cache.slots_N.data_ptr(),
        lengths=batch.context_lens.data_ptr(),
        tables=batch.block_tables.data_ptr(),
        cosines=cos.data_ptr(),
        sines=sin.data_ptr(),
    )
