"""Causal attention: one function on plain tensors, and the slow twin that defines it.

    y_BSHK = causal_attention(q_BSHK, k_BTGK, v_BTGK, window=None)

The S queries are the last S of the T positions. Prefill is bound by arithmetic and goes through PyTorch's fused kernel;
decode (S = 1) is bound by reading k and v.

Shapes: B sequences, S query positions, T key positions, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_mask(
    queries: int, keys: int, window: int | None, device: torch.device | None = None
) -> torch.Tensor:
    """mask_ST, True where query s (the last `queries` of `keys` positions) may look at key t."""
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    mask = k <= q
    return mask if window is None else mask & (k > q - window)


def causal_attention(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, *, window: int | None = None
) -> torch.Tensor:
    """Softmax attention of the last S positions over T, scaled by 1/sqrt(K); heads share keys in groups of H/G.

    `window` counts the positions a query sees, itself included (Mistral's sliding window). Returns y_BSHK.
    """
    S, T = q_BSHK.shape[1], k_BTGK.shape[1]
    if window is not None and window >= T:
        window = None
    plain = window is None and (S == 1 or S == T)
    mask = None if plain else causal_mask(S, T, window, q_BSHK.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    k, v, grouped = shared_heads(q, k, v, masked=mask is not None)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and S > 1, enable_gqa=grouped)
    return y.transpose(1, 2)


def shared_heads(
    q_BHSK: torch.Tensor, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, *, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """k and v for PyTorch's attention, and whether it is to share their heads. On CUDA it does that in the flash kernel
    alone, which takes no mask: with one, it would write out all scores, so that k and v are repeated instead."""
    groups = q_BHSK.shape[1] // k_BGTK.shape[1]
    if groups > 1 and masked and q_BHSK.device.type == "cuda":
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k_BGTK, v_BGTK))
        return k, v, False
    return k_BGTK, v_BGTK, groups > 1


def causal_attention_reference(
    q_BSHK: torch.Tensor, k_BTGK: torch.Tensor, v_BTGK: torch.Tensor, *, window: int | None = None
) -> torch.Tensor:
    """The slow twin of causal_attention: scores, mask, softmax, sum, in float32."""
    S, T, groups = q_BSHK.shape[1], k_BTGK.shape[1], q_BSHK.shape[2] // k_BTGK.shape[2]
    k = k_BTGK.repeat_interleave(groups, dim=2).float()
    v = v_BTGK.repeat_interleave(groups, dim=2).float()
    scores = torch.einsum("bshk,bthk->bhst", q_BSHK.float(), k) / q_BSHK.shape[-1] ** 0.5
    scores = scores.masked_fill(~causal_mask(S, T, window, q_BSHK.device), float("-inf"))
    return torch.einsum("bhst,bthk->bshk", scores.softmax(-1), v).to(q_BSHK.dtype)
