"""The one decoder of octad: embeddings, N x (attention + feed-forward), norm, head; dense or mixture per layer.

    model = Transformer(config); logits_BSV = model(tokens_BS)
    model(tokens_BS, cache=ContiguousCache(config, B, capacity))        # then feed only the new tokens

It reads top to bottom like the paper and knows nothing of files, training or serving. Parameter names are those of the
public checkpoints. Pre-norm residual blocks, RMSNorm, rotary positions, grouped-query attention: Llama's arithmetic,
with the other families' switches taken from the config.

Shapes: B sequences, S positions, D model, H heads, G key/value heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from octad.kernels.attention import causal_attention
from octad.model.cache import KVCache
from octad.model.config import ModelConfig
from octad.model.moe import MLP, MoE
from octad.model.rope import Rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as x; the mean of squares is taken in float32."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.clip = layer, config.head_dim, config.clip_qkv
        self.window, self.norm_heads = config.window(layer), config.qk_norm == "head"
        D, q = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(D, q, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, D, bias=config.o_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm != "none":
            self.q_norm = RMSNorm(self.head_dim if self.norm_heads else q, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim if self.norm_heads else kv, config.rms_norm_eps)

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """y_BSD; with a cache, the positions continue where the cache ends."""
        start = cache.positions(x_BSD.shape[1]) if cache else 0
        q, k, v = self.project(x_BSD)
        q = self.rotate(self.heads(q, self.q_norm), rope, start)
        k = self.rotate(self.heads(k, self.k_norm), rope, start)
        v = self.heads(v, None)
        y = cache.attend(self.layer, q, k, v) if cache else causal_attention(q, k, v, window=self.window)
        return self.output(y.flatten(2))

    # the steps that faster modules take in another way

    def project(self, x_BSD: torch.Tensor) -> Sequence[torch.Tensor]:
        """q, k and v before norms and rotation, [B, S, heads * K]."""
        return self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)

    def rotate(self, x_BSHK: torch.Tensor, rope: Rope, start: int | torch.Tensor) -> torch.Tensor:
        """q or k at its positions."""
        return rope.rotate(x_BSHK, start)

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """What goes into the residual stream, [B, S, D], of the heads' answers [B, S, H * K]."""
        out: torch.Tensor = self.o_proj(y)
        return out

    def heads(self, x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """[B, S, heads * K] to [B, S, heads, K], normalised per head or as a whole, clipped where the family does."""
        if norm is not None and not self.norm_heads:
            x = norm(x)
        if self.clip is not None:
            x = x.clamp(-self.clip, self.clip)
        x = x.view(*x.shape[:-1], -1, self.head_dim)
        return norm(x) if norm is not None and self.norm_heads else x


class DecoderLayer(nn.Module):
    """One block: x + attention(norm(x)), then h + feed_forward(norm(h))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module = (
            MoE(config)
            if config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        )

    def attend(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """The first half, h_BSD. What a router reads is post_attention_layernorm(h)."""
        out: torch.Tensor = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rope, cache)
        return out

    def forward(self, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
        """The whole block, [B, S, D] to [B, S, D]."""
        h_BSD = self.attend(x_BSD, rope, cache)
        out: torch.Tensor = h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))
        return out


class Decoder(nn.Module):
    """Embeddings, the stack of blocks and the last norm: the part that the hub calls `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config)

    def forward(self, tokens_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Normalised hidden states x_BSD of the given tokens."""
        x_BSD: torch.Tensor = self.embed_tokens(tokens_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, self.rope, cache)
        if cache:
            cache.advance(tokens_BS.shape[1])
        out: torch.Tensor = self.norm(x_BSD)
        return out


class Transformer(nn.Module):
    """A decoder with its language-model head. Call it for logits; call `.model` for hidden states."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head: nn.Module | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def head(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of normalised hidden states [..., D], in the model's dtype."""
        if self.lm_head is None:
            return F.linear(x_BSD, self.model.embed_tokens.weight)
        logits: torch.Tensor = self.lm_head(x_BSD)
        return logits

    def forward(self, tokens_BS: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Logits logits_BSV for every given position."""
        return self.head(self.model(tokens_BS, cache))
