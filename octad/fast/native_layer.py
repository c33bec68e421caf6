"""A decoder that decodes many layers in one call, and otherwise is the composition of its parts.

    model.model.layers[i] = NativeLayer(layer, config)          # its parts are native modules already
    model.model = NativeDecoder(kernels, model.model)

Between the weights' reading, a token's layer is some twenty small operations, and handing over from Python to the kernel
costs as much as several of them. So in a step in which every sequence has one new token (decoding) layers that route
alike run in one call; prompts, calls without pages, and shapes that the kernel does not know go through the parts, which
also are its slow twin. Both give the same bits, so what a sequence says does not depend on whether another one's prompt
is in the same step.

Shapes: R sequences, D model, L layers of a call, A experts a token.
"""

from __future__ import annotations

import ctypes
from itertools import takewhile
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.native_modules import NativeAttention, NativeExperts, NativeMLP, NativeRouter
from octad.fast.offloaded import OffloadedExperts
from octad.kernels.calls import DTYPES
from octad.kernels.native import BlockStruct, LayerArray, NativeKernels, StepStruct
from octad.model.cache import KVCache
from octad.model.config import ModelConfig
from octad.model.moe import FixedRouter, MoE
from octad.model.observe import Watch
from octad.model.paged_cache import BlockPool, PagedCache
from octad.model.rope import Rope
from octad.model.transformer import Decoder, DecoderLayer


class NativeLayer(nn.Module):
    """DecoderLayer, with the same children under the same names, and what the kernel asks of it."""

    def __init__(self, layer: DecoderLayer, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.layer = layer.self_attn.layer
        self._struct = block_struct(layer, config)
        self.block = None if self._struct is None else ctypes.addressof(self._struct)
        experts: Any = layer.mlp.experts if isinstance(layer.mlp, MoE) else None
        self.offload = experts.offload if isinstance(experts, OffloadedExperts) else None
        if self.offload is not None and self._struct is not None:
            self.offload.connect(self._struct, self.layer)
        # nn.Module looks its children up slowly, and this one is looked up in every step
        self._mlp = (layer.mlp,)

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """As DecoderLayer.forward."""
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
        if self.block is None:
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


class Alike(NamedTuple):
    """Layers that route alike ("routed", or "dense"), to `top_k` experts a token, for one call."""

    array: LayerArray
    kind: str
    top_k: int
    layers: list[NativeLayer]
    numbers: list[int]


class NativeDecoder(Decoder):
    """Decoder, with the same children under the same names."""

    def __init__(self, kernels: NativeKernels, decoder: Decoder) -> None:
        nn.Module.__init__(self)
        self.kernels = kernels
        self.embed_tokens, self.layers = decoder.embed_tokens, decoder.layers
        self.norm, self.rope = decoder.norm, decoder.rope
        self._arrays: dict[tuple[int, int], tuple[BlockPool, LayerArray]] = {}
        # where each layer's router stands. After a step's weights nothing else is left in the processor's cache, and
        # modules are many small things in many places
        self._tables = [layer._mlp[0]._modules for layer in cast(list[NativeLayer], list(self.layers))]
        self._seen: tuple[list[Any], list[Any], list[tuple[str, int] | None]] | None = None
        self._ears: list[Any] = []  # the routers' tables of hooks
        self._whole: tuple[Any, BlockPool, Alike | None] | None = None

    def in_one_call(self, cache: KVCache | None) -> bool:
        """Whether all layers of this step run in one call of the kernel, whose routing is its own."""
        first = self._routings()[0] if _decodes(cache) else None
        return first is not None and first[0] == "routed" and len(self._alike(0)) == len(self.layers)

    def alike(self, pool: BlockPool) -> Alike | None:
        """All layers, where one call runs them without a router's module: their own routing, or none at all, and nobody
        listens at the routers."""
        first = self._routings()[0]
        if first is None or first[0] == "given" or any(self._ears):
            return None
        if self._whole is None or self._whole[0] is not self._seen or self._whole[1] is not pool:
            layers = self._alike(0)
            found = None
            if len(layers) == len(self.layers):
                numbers = [layer.layer for layer in layers]
                found = Alike(self._array(layers, pool), *first, layers, numbers)
            self._whole = self._seen, pool, found
        return self._whole[2]

    def _routings(self) -> list[tuple[str, int] | None]:
        """Each layer's `routing`, found anew only where a router was changed, or is another's."""
        gates: list[Any] = [table.get("gate") for table in self._tables]
        own = [gate.top_k if type(gate) is NativeRouter else 0 if gate is None else -1 for gate in gates]
        if self._seen is None or self._seen[0] != gates or self._seen[1] != own or -1 in own:
            found = [layer.routing for layer in cast(list[NativeLayer], list(self.layers))]
            self._seen = gates, own, found
            self._ears = [gate._forward_hooks for gate in gates if gate is not None]
        return self._seen[2]

    def _alike(self, place: int) -> list[NativeLayer]:
        """The layer at this place and those behind it that one call runs; none where the kernel does not know it."""
        routings = self._routings()
        if (first := routings[place]) is None:
            return []
        count = sum(1 for _ in takewhile(lambda routing: routing == first, routings[place:]))
        return cast(list[NativeLayer], list(self.layers)[place : place + count])

    def forward(self, tokens_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """As Decoder.forward."""
        x_BSD: torch.Tensor = self.embed_tokens(tokens_BS)
        layers, place, decodes = cast(list[NativeLayer], list(self.layers)), 0, _decodes(cache)
        while place < len(layers):
            run = self._alike(place) if decodes else []
            if run:
                assert isinstance(cache, PagedCache)
                x_BSD = self._decode(run, x_BSD, cache)
            else:
                x_BSD = layers[place](x_BSD, self.rope, cache)
            place += max(1, len(run))
        if cache:
            cache.advance(tokens_BS.shape[1])
        out: torch.Tensor = self.norm(x_BSD)
        return out

    def _decode(self, layers: list[NativeLayer], x_1RD: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """Layers that route alike, for one new token of each sequence."""
        routing, watch = layers[0].routing, cache.watch
        assert routing is not None
        alone_R = watch.alone_N if watch is not None and routing[0] == "routed" else None
        given, top_k = routing[0] != "routed" or alone_R is not None, 1 if alone_R is not None else routing[1]
        shape = (len(layers), x_1RD.shape[1], top_k)
        weights_LRA, experts_LRA = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        if alone_R is not None:
            weights_LRA.fill_(1.0)
            experts_LRA[:] = alone_R[:, None]
        elif given:
            _fill_in(layers, x_1RD[0], weights_LRA, experts_LRA)
        step = _step(cache, self.rope, x_1RD, given)
        y = self.kernels.layers(self._array(layers, cache.pool), step, x_1RD, weights_LRA, experts_LRA)
        if (offload := layers[0].offload) is not None:
            offload.after([layer.layer for layer in layers], experts_LRA)
        if alone_R is not None:  # as wide as the routers' own answers; what is left over weighs nothing
            weights_LRA = F.pad(weights_LRA, (0, routing[1] - 1))
            experts_LRA = experts_LRA.expand(-1, -1, routing[1])
        if routing[0] == "routed":
            gates = [self._tables[layer.layer]["gate"] for layer in layers]
            _tell_observers([layer.layer for layer in layers], gates, x_1RD, weights_LRA, experts_LRA, watch)
        return y

    def _array(self, layers: list[NativeLayer], pool: BlockPool) -> LayerArray:
        """The layers as the kernel takes them, made once."""
        place = layers[0].layer, len(layers)
        held = self._arrays.get(place)
        if held is None or held[0] is not pool:
            numbers = [layer.layer for layer in layers]
            blocks = [layer.block for layer in layers if layer.block is not None]
            keys, values = [pool.keys[n] for n in numbers], [pool.values[n] for n in numbers]
            held = self._arrays[place] = pool, LayerArray.of(blocks, keys, values)
        return held[1]


def _decodes(cache: KVCache | None) -> bool:
    """Whether every sequence has one new token, and no row has several experts barred."""
    if not (isinstance(cache, PagedCache) and cache.decoding):
        return False
    watch = cache.watch
    return watch is None or watch.bias_NE is None or watch.alone_N is not None


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
    numbers: list[int],
    gates: list[Any],
    x_1RD: torch.Tensor,
    weights_LRA: torch.Tensor,
    experts_LRA: torch.Tensor,
    watch: Watch | None,
) -> None:
    """What calling the routers of these layers would have told their hooks; the engine's own hears it all at once."""
    if watch is not None:
        watch.hear(numbers, weights_LRA, experts_LRA)
    for number, gate in enumerate(gates):
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
