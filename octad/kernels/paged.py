"""Attention over a paged key/value cache: one function on plain tensors, and the slow twin that defines it.

    batch = PagedBatch.of(queries=[1, 1, 40], contexts=[17, 5, 40], tables=[[3, 1], [0], [2, 4, 5]], device="cpu")
    y_NHK = paged_attention(q_NHK, keys, values, batch, window)

R sequences of different lengths lie side by side in the N tokens of a step: `queries[r]` new tokens each, the last of
`contexts[r]` positions, whose keys and values (the new ones included) are in the blocks that row r of `block_tables`
names. Sequences with one new token, which is all of them while decoding, are gathered into one padded batch; a prompt's
chunk goes through PyTorch's fused kernel alone. Both are bound by copying keys and values out of their blocks: what a
native kernel of this signature saves.

Shapes: N tokens of the step, R sequences, T positions, W positions of a padded row, P block size, H heads, G key/value
heads, K head dimension. keys and values are [blocks, P, G, K].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from octad.kernels.attention import causal_attention_reference, causal_mask, shared_heads


@dataclass(frozen=True)
class PagedBatch:
    """Where each sequence of a step lies: int32 tensors for kernels, and the same lengths as lists for the host.

    query_starts [R+1] (its last entry is N), context_lens [R], block_tables [R, most blocks], filled up with 0. `memo`
    keeps what is the same in every layer of the step, such as masks.
    """

    query_starts: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    queries: list[int]
    contexts: list[int]
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        queries: list[int],
        contexts: list[int],
        tables: Sequence[Any],
        device: torch.device | str = "cpu",
    ) -> PagedBatch:
        """From lengths and each sequence's blocks: any sequence of integers, an `array("i")` being the fastest."""
        padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        lengths = np.array([0, *accumulate(queries), *contexts], np.int32)
        starts, lens = (
            torch.from_numpy(lengths).to(device, non_blocking=True).tensor_split((len(queries) + 1,))
        )
        block_tables = torch.from_numpy(padded).to(device, non_blocking=True)
        return cls(starts, lens, block_tables, queries, contexts)

    def alone(self, r: int) -> PagedBatch:
        """Sequence r as the only one, for one new token."""
        rows = slice(r, r + 1)
        lens, tables = self.context_lens[rows], self.block_tables[rows]
        return PagedBatch(self.query_starts[:2], lens, tables, self.queries[rows], self.contexts[rows])


PagedAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PagedBatch, int | None],
    torch.Tensor,
]


def paged_attention(
    q_NHK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    window: int | None,
    decode: PagedAttention | None = None,
) -> torch.Tensor:
    """Causal softmax attention of each sequence's new tokens over its own positions, scaled by 1/sqrt(K); y_NHK.

    `window` counts the positions that a token sees, itself included; None for all.
    `decode` serves the leading sequences that have one new token each (the default: a padded batch).
    """
    decode = decode or _decode
    decoding = next((r for r, n in enumerate(batch.queries) if n > 1), len(batch.queries))
    parts = [decode(q_NHK[:decoding], keys, values, batch, window)] if decoding else []
    start = decoding
    for r in range(decoding, len(batch.queries)):
        end = start + batch.queries[r]
        if batch.queries[r] == 1:
            # as it would be in front: how a sequence is served must not depend on its company
            parts.append(decode(q_NHK[start:end], keys, values, batch.alone(r), window))
        else:
            parts.append(_prefill(q_NHK[start:end], keys, values, batch, r, window))
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(
    q_RHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """The first R sequences, one new token each. The H/G heads that share keys become queries of one head, so that
    nothing is repeated."""
    R, H, K = q_RHK.shape
    P, G = keys.shape[1:3]
    longest = max(batch.contexts[:R])
    blocks = -(-longest // P)
    index = batch.memo.get("index")
    if index is None:
        index = batch.memo["index"] = batch.block_tables[:R, :blocks].flatten()
    k = keys.index_select(0, index).view(R, blocks * P, G, K).transpose(1, 2)
    v = values.index_select(0, index).view(R, blocks * P, G, K).transpose(1, 2)
    mask = None
    if R == 1:
        first = 0 if window is None else max(0, longest - window)
        k, v = k[:, :, first:longest], v[:, :, first:longest]
    else:
        mask = batch.memo.get(window)
        if mask is None:
            mask = _decode_mask(batch.context_lens[:R], blocks * P, window, q_RHK.dtype)
            batch.memo[window] = mask
    y = F.scaled_dot_product_attention(q_RHK.view(R, G, H // G, K), k, v, attn_mask=mask)
    return y.reshape(R, H, K)


def _decode_mask(
    contexts_R: torch.Tensor, width: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores [R, 1, 1, W]: 0 where the last position of a context may look, -inf elsewhere."""
    t = torch.arange(width, device=contexts_R.device)
    seen = t < contexts_R[:, None]
    if window is not None:
        seen &= t >= contexts_R[:, None] - window
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[
        :, None, None
    ]


def _prefill(
    q_SHK: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    r: int,
    window: int | None,
) -> torch.Tensor:
    """Sequence r alone: its S new tokens over the positions that the window lets them see."""
    S, T, P = len(q_SHK), batch.contexts[r], keys.shape[1]
    first = 0 if window is None else max(0, T - S - window + 1) // P
    index = batch.block_tables[r, first : -(-T // P)]
    T -= first * P
    k = keys.index_select(0, index).flatten(0, 1)[:T]
    v = values.index_select(0, index).flatten(0, 1)[:T]
    plain = S == T and (window is None or window >= T)
    mask = batch.memo.get((r, window))
    if mask is None and not plain:
        mask = batch.memo[r, window] = causal_mask(S, T, window, q_SHK.device)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHK, k, v))
    k, v, grouped = shared_heads(q, k, v, masked=mask is not None)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, enable_gqa=grouped)
    return y[0].transpose(0, 1)


def paged_attention_reference(
    q_NHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """The slow twin of paged_attention: one sequence after the other, position by position, in float32."""
    y_NHK = torch.empty_like(q_NHK)
    P = keys.shape[1]
    for r, T in enumerate(batch.context_lens.tolist()):
        start, end = batch.query_starts[r : r + 2].tolist()
        places = [(batch.block_tables[r, t // P], t % P) for t in range(T)]
        k_TGK = torch.stack([keys[block, offset] for block, offset in places])
        v_TGK = torch.stack([values[block, offset] for block, offset in places])
        y = causal_attention_reference(q_NHK[start:end][None], k_TGK[None], v_TGK[None], window=window)
        y_NHK[start:end] = y[0]
    return y_NHK
