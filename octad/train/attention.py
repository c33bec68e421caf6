"""Attention that stays within a document: the attention seam's third implementation, for packed windows.

    hidden = model.model(tokens_BS, DocumentAttention(config, documents_BS))

Each document is attended to by itself, which is exact, and cheaper than masking: the cost grows with the square of a
document's length, not of the window's. Windows of a single document go through the kernel together. Positions run on
over the whole window: rotary attention sees differences of positions only, so a document computes what it would alone.

Shapes: B windows, S positions, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import torch

from octad.kernels.attention import causal_attention
from octad.model.config import ModelConfig


class DocumentAttention:
    """A KVCache (octad.model.cache) that keeps nothing and attends within documents."""

    def __init__(self, config: ModelConfig, documents_BS: torch.Tensor) -> None:
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents_BS]
        self.single = all(len(lengths) == 1 for lengths in self.lengths)

    def positions(self, count: int) -> int:
        """See KVCache.positions."""
        return 0

    def attend(
        self, layer: int, q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor
    ) -> torch.Tensor:
        """See KVCache.attend."""
        window = self.windows[layer]
        if self.single:
            return causal_attention(q_BSHK, k_BSGK, v_BSGK, window=window)
        flat = [length for lengths in self.lengths for length in lengths]
        parts = (torch.split(x.flatten(0, 1)[None], flat, 1) for x in (q_BSHK, k_BSGK, v_BSGK))
        documents = zip(*parts, strict=True)
        y = torch.cat([causal_attention(q, k, v, window=window) for q, k, v in documents], 1)
        return y.view(q_BSHK.shape)

    def advance(self, positions: int) -> None:
        """See KVCache.advance."""
