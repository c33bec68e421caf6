"""The attention seam: what Attention asks of a key/value cache, and the simplest cache.

Attention hands its rotated q, k, v of the new positions to `cache.attend(layer, ...)` and gets the attended values back.
A contiguous buffer (here) and paged blocks (the engine's) are two implementations; the model knows neither.

Shapes: B sequences, S new positions, T positions so far, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from typing import Protocol

import torch

from octad.kernels.attention import causal_attention
from octad.model.config import ModelConfig


class KVCache(Protocol):
    """Keys and values of the positions seen so far."""

    def positions(self, count: int) -> int | torch.Tensor:
        """Where the next `count` tokens stand: the first one's position, or a tensor [count] of all of theirs."""

    def attend(
        self, layer: int, q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor
    ) -> torch.Tensor:
        """Append k and v of this layer and return the attention of q over all positions, y_BSHK."""

    def advance(self, positions: int) -> None:
        """Count the new positions, once all layers have attended."""


class ContiguousCache:
    """One buffer a layer, [B, capacity, G, K]; all sequences have the same length."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.windows = [config.window(layer) for layer in layers]
        self.capacity = capacity
        self.length = 0

    def positions(self, count: int) -> int:
        """See KVCache.positions."""
        return self.length

    def attend(
        self, layer: int, q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor
    ) -> torch.Tensor:
        """See KVCache.attend. Raises ValueError past the capacity."""
        end = self.length + k_BSGK.shape[1]
        if end > self.capacity:
            raise ValueError(f"cache holds {self.capacity} positions, {end} are needed")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, self.length : end] = k_BSGK
        values[:, self.length : end] = v_BSGK
        return causal_attention(q_BSHK, keys[:, :end], values[:, :end], window=self.windows[layer])

    def advance(self, positions: int) -> None:
        """See KVCache.advance."""
        self.length += positions
