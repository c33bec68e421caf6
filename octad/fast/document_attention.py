"""Attention that stays within a document: the attention seam's third implementation, for packed windows.

    hidden = model.model(tokens_BS, DocumentAttention(config, documents_BS))

Each document is attended to by itself, which is exact, and cheaper than masking: the cost grows with the square of a
document's length, not of the window's. Windows of a single document go through the kernel together, on a GPU documents
of any lengths (octad/kernels/varlen.py). What lies where is worked out on the host, once for all layers. Positions run
on over the whole window: rotary attention sees differences of positions only, so a document computes what it would alone.

Shapes: B windows, S positions, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from octad.kernels.attention import causal_attention
from octad.kernels.blocked import Segment, blocked_attention
from octad.kernels.varlen import varlen_attention, varlen_suits
from octad.model.config import ModelConfig


class DocumentAttention:
    """A KVCache (octad.model.cache) that keeps nothing and attends within documents."""

    def __init__(
        self, config: ModelConfig, documents_BS: torch.Tensor, device: torch.device | str | None = None
    ) -> None:
        """`documents_BS` tells documents apart, best on the host; `device`: where attention is computed (its own)."""
        self.windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        self.segments = _segments(documents_BS.cpu())
        self.longest = max(segment.length for segment in self.segments)
        lengths = [segment.length for segment in self.segments for _ in range(segment.sequences)]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        self.starts = starts.to(documents_BS.device if device is None else device)

    def positions(self, count: int) -> int:
        """See KVCache.positions."""
        return 0

    def attend(
        self, layer: int, q_BSHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor
    ) -> torch.Tensor:
        """See KVCache.attend."""
        q, k, v = (x.flatten(0, 1) for x in (q_BSHK, k_BSGK, v_BSGK))
        window = self.windows[layer]
        if q.device.type == "cpu":
            return blocked_attention(q, k, v, self.segments, window).view(q_BSHK.shape)
        if varlen_suits(q):
            return varlen_attention(q, k, v, self.starts, self.longest, window).view(q_BSHK.shape)
        return fused_attention(q, k, v, self.segments, window).view(q_BSHK.shape)

    def advance(self, positions: int) -> None:
        """See KVCache.advance."""


def fused_attention(
    q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor, segments: list[Segment], window: int | None
) -> torch.Tensor:
    """The signature of blocked_attention, through PyTorch's fused kernel: for GPUs, where varlen_attention is not."""
    sizes = [segment.sequences * segment.length for segment in segments]
    parts = zip(segments, *(torch.split(x, sizes) for x in (q_NHK, k_NGK, v_NGK)), strict=True)
    done = []
    for segment, *qkv in parts:
        q, k, v = (x.view(segment.sequences, segment.length, *x.shape[1:]) for x in qkv)
        done.append(causal_attention(q, k, v, window=window).flatten(0, 1))
    return torch.cat(done)


def _segments(documents_BS: torch.Tensor) -> list[Segment]:
    """Runs of one document; windows that hold a single one each make one segment together."""
    lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents_BS]
    if all(len(row) == 1 for row in lengths):
        return [Segment(0, len(lengths), documents_BS.shape[1])]
    found, start = [], 0
    for length in (length for row in lengths for length in row):
        found.append(Segment(start, 1, length))
        start += length
    return found
