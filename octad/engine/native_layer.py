"""A decoder layer that decodes in one call, and otherwise is the composition of its parts.

    model.model.layers[i] = NativeLayer(kernels, layer)      # a DecoderLayer whose parts are native modules already

Between the weights' reading, a token's layer is some twenty small operations. One call from Python costs as much as one
of them, so for a step in which every sequence has one new token (decoding) the whole layer is one call; prompts, calls
without pages, and shapes that the kernel does not know go through the parts, which also are its slow twin. Both give the
same bits, so what a sequence says does not depend on whether another one's prompt is in the same step.

Shapes: R sequences, D model, A experts a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import nn

from octad.engine.native_modules import NativeAttention, NativeExperts, NativeMLP, NativeRouter
from octad.engine.paged_cache import PagedCache
from octad.kernels.native import DTYPES, BlockStruct, NativeKernels, StepStruct
from octad.model.cache import KVCache
from octad.model.config import ModelConfig
from octad.model.moe import FixedRouter, MoE
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer


class NativeLayer(nn.Module):
    """DecoderLayer, with the same children under the same names."""

    def __init__(self, kernels: NativeKernels, layer: DecoderLayer, config: ModelConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self.layer = layer.self_attn.layer
        self._struct = block_struct(layer, config)
        self._block = None if self._struct is None else ctypes.addressof(self._struct)

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """As DecoderLayer.forward."""
        if isinstance(cache, PagedCache) and cache.decoding and self.fused:
            return self.decode(x_BSD, rope, cache)
        h_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, cache)
        out: torch.Tensor = h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))
        return out

    @property
    def fused(self) -> bool:
        """Whether one call does it: the kernel knows the layer, and how it routes (as its own, or without looking)."""
        known = self.router is None or isinstance(self.router, (NativeRouter, FixedRouter))
        return self._block is not None and known

    @property
    def router(self) -> nn.Module | None:
        """The router that is in place now; None for a dense layer."""
        return self.mlp.gate if isinstance(self.mlp, MoE) else None

    def decode(self, x_1RD: torch.Tensor, rope: Rope, cache: PagedCache) -> torch.Tensor:
        """The layer in one call, for one new token of each sequence."""
        gate: Any = self.router
        given = not isinstance(gate, NativeRouter)
        weights, experts = self._routing(gate, x_1RD[0])
        step = _step(cache, rope, x_1RD, given)
        keys, values = cache.pool.keys[self.layer], cache.pool.values[self.layer]
        assert self._block is not None
        y = self.kernels.block(self._block, step, x_1RD, keys, values, weights, experts)
        if not given:
            for hook in gate._forward_hooks.values():  # what calling the router would have told its observers
                hook(gate, (x_1RD,), (weights, experts))
        return y

    def _routing(self, gate: Any, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_RA and experts_RA: a fixed router's, a dense layer's only expert, or room for what the kernel finds."""
        R = len(x_RD)
        if gate is None:
            return torch.ones(R, 1), torch.zeros(R, 1, dtype=torch.int64)
        if isinstance(gate, NativeRouter):
            return torch.empty(R, gate.top_k), torch.empty(R, gate.top_k, dtype=torch.int64)
        weights, experts = gate(x_RD)
        return weights.float().contiguous(), experts.contiguous()


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
