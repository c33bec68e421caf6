"""Attention of sequences of many lengths in one call, on CUDA: PyTorch's flash kernels (torch.nn.attention.varlen).

    if varlen_suits(q_NHK):
        y_NHK = varlen_attention(q_NHK, k_NGK, v_NGK, starts, longest, window)     # documents side by side, to train
        y_NHK = varlen_paged(q_NHK, keys, values, batch, window)                   # the signature of paged_attention

No mask is made, heads share keys without copies of them, and the host waits for nothing. PyTorch's own kernels read keys
and values that lie together, so that those of a step's sequences are gathered out of their blocks, a copy a layer;
where FlashAttention 3 or 4 is installed and activated (torch.nn.attention.activate_flash_attention_impl) they are read in
their blocks. Twins: blocked_attention over the same documents, paged_attention_reference.

Shapes: N tokens, R sequences, H heads, G key/value heads, K head dimension, W blocks a sequence, P block size.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from octad.kernels.paged import PagedBatch

WIDEST = 256  # head dimension of the kernels
AMPERE = (8, 0)  # compute capability that they need


@functools.cache
def _varlen() -> tuple[Any, frozenset[str]]:
    """PyTorch's function and its keywords; older versions have none, or know no windows, shared heads or lengths."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def varlen_suits(q_NHK: torch.Tensor) -> bool:
    """Whether the kernels are there for such queries: 16 bits, on CUDA, heads of a width that they take."""
    K = q_NHK.shape[-1]
    return (
        q_NHK.device.type == "cuda"
        and q_NHK.dtype in (torch.bfloat16, torch.float16)
        and K % 8 == 0
        and K <= WIDEST
        and "window_size" in _varlen()[1]
        and torch.cuda.get_device_capability(q_NHK.device) >= AMPERE
    )


def varlen_attention(
    q_NHK: torch.Tensor,
    k_NGK: torch.Tensor,
    v_NGK: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of each sequence to itself; it has a backward. `starts`, int32: where each begins, and N."""
    attend, known = _varlen()
    options: dict[str, Any] = {"window_size": _seen(window)}
    if "enable_gqa" in known:
        options["enable_gqa"] = q_NHK.shape[1] != k_NGK.shape[1]
    else:
        groups = q_NHK.shape[1] // k_NGK.shape[1]
        k_NGK, v_NGK = (x.repeat_interleave(groups, dim=1) for x in (k_NGK, v_NGK))
    y: torch.Tensor = attend(q_NHK, k_NGK, v_NGK, starts, starts, longest, longest, **options)
    return y


def pages_suit(q_NHK: torch.Tensor) -> bool:
    """Whether varlen_paged can be used: it needs kernels that are told how much of each sequence's room is used."""
    return varlen_suits(q_NHK) and {"seqused_k", "enable_gqa"} <= _varlen()[1]


def varlen_paged(
    q_NHK: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PagedBatch, window: int | None
) -> torch.Tensor:
    """See octad.kernels.paged.paged_attention: new tokens and prompts in one call."""
    attend, _ = _varlen()
    R, W = batch.block_tables.shape
    P = keys.shape[1]
    options: dict[str, Any] = {"window_size": _seen(window), "enable_gqa": q_NHK.shape[1] != keys.shape[2]}
    rooms = None
    if reads_blocks(q_NHK.device):
        options["block_table"] = batch.block_tables
    else:
        blocks = batch.memo.get("blocks")
        if blocks is None:
            blocks = batch.memo["blocks"] = batch.block_tables.flatten()
            batch.memo["rooms"] = torch.arange(R + 1, dtype=torch.int32, device=q_NHK.device) * (W * P)
        rooms = batch.memo["rooms"]
        keys, values = (x.index_select(0, blocks).flatten(0, 1) for x in (keys, values))
    lengths = (max(batch.queries), W * P)
    y: torch.Tensor = attend(
        q_NHK, keys, values, batch.query_starts, rooms, *lengths, seqused_k=batch.context_lens, **options
    )
    return y


def reads_blocks(device: torch.device) -> bool:
    """Whether the kernels that are active read keys and values in their blocks: FlashAttention 4 does on compute
    capability 10 alone."""
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active is None or "block_table" not in _varlen()[1]:
        return False
    return bool(active != "FA4" or torch.cuda.get_device_capability(device)[0] == 10)


def _seen(window: int | None) -> tuple[int, int]:
    """How many positions before its own a token sees, and after it."""
    return (-1, 0) if window is None else (window - 1, 0)
