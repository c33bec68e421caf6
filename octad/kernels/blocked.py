"""Causal attention for training on CPUs: blocks of queries over plain matrix products, and a backward of its own.

    y_NHK = blocked_attention(q_NHK, k_NGK, v_NGK, [Segment(0, 1, 200), Segment(200, 1, 312)], window=None)

PyTorch's fused kernel reaches about a fifth of a CPU's bfloat16 rate, forward and backward. Here a block of queries, the
heads that share keys stacked under each other, meets the keys up to its end in one batched product; what lies above
the diagonal is skipped but for the block itself. The probabilities of sequences up to KEPT tokens wait for the backward
(S H bytes a token: less than the rest of a layer keeps); of longer ones they are made again, nothing quadratic is kept.
All segments (documents, or windows of one length) go through one node of the graph. Twin: causal_attention_reference.

Shapes: N tokens, B sequences of a segment, S positions, H heads, G key/value heads, R = H / G, K head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch

from octad.kernels.passes import quick_passes

BLOCK = 128  # queries at a time; at 512 positions 3 x as fast as the fused kernel, and so are 64 and 256 within 20 %
KEPT = 512  # tokens of a sequence up to which its probabilities are kept


class Segment(NamedTuple):
    """`sequences` of `length` tokens each that lie one after another from token `start`."""

    start: int
    sequences: int
    length: int


def blocked_attention(
    q_NHK: torch.Tensor,
    k_NGK: torch.Tensor,
    v_NGK: torch.Tensor,
    segments: Sequence[Segment],
    window: int | None = None,
) -> torch.Tensor:
    """Each sequence attends to itself: causal softmax attention scaled by 1/sqrt(K), y_NHK. `window`: see
    causal_attention. The segments cover all N tokens."""
    return cast(torch.Tensor, _Blocked.apply(q_NHK, k_NGK, v_NGK, segments, window))  # type: ignore[no-untyped-call]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Sequence[Segment],
        window: int | None,
    ) -> torch.Tensor:
        """y [N, H, K] of q [N, H, K], k and v [N, G, K]."""
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        kept = []
        for segment in segments:
            q_BGRSK, y_BGRSK = (_queries(t, k.shape[1], segment) for t in (q, y))
            k_XKS, v_XSK = _keys(k, segment).transpose(1, 2), _keys(v, segment)
            for rows, seen in _blocks(segment.length, window):
                queries, part = q_BGRSK[:, :, :, rows], y_BGRSK[:, :, :, rows]
                p = _probabilities(_stacked(queries), k_XKS[:, :, seen], queries.shape[3], window)
                part.copy_(torch.bmm(p, v_XSK[:, seen]).view(part.shape))
                if segment.length <= KEPT:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.segments, ctx.window = segments, window
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, k and v from y's."""
        (dy,), (q, k, v, *saved) = grads, ctx.saved_tensors
        kept, passes = iter(saved), quick_passes()
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for segment in ctx.segments:
            q_BGRSK, dy_BGRSK, dq_BGRSK = (_queries(t, k.shape[1], segment) for t in (q, dy, dq))
            k_XSK, v_XKS = _keys(k, segment), _keys(v, segment).transpose(1, 2)
            dk_XSK, dv_XSK = (_sums(k_XSK) for _ in range(2))
            for rows, seen in _blocks(segment.length, ctx.window):
                part = q_BGRSK[:, :, :, rows]
                dy_XTK, q_XTK, block = _stacked(dy_BGRSK[:, :, :, rows]), _stacked(part), part.shape[3]
                if segment.length <= KEPT:
                    p = next(kept)
                else:
                    p = _probabilities(q_XTK, k_XSK.transpose(1, 2)[:, :, seen], block, ctx.window)
                dp = torch.bmm(dy_XTK, v_XKS[:, :, seen])
                # before anything else is done with p: it is read in order, and lies in the cache then
                ds = passes.softmax_backward_(p, dp, block, ctx.window, q.shape[-1] ** -0.5)
                dv_XSK[:, seen] += torch.bmm(p.transpose(1, 2), dy_XTK)
                dq_BGRSK[:, :, :, rows] = torch.bmm(ds, k_XSK[:, seen]).view(part.shape)
                dk_XSK[:, seen] += torch.bmm(ds.transpose(1, 2), q_XTK)
            _put_keys(dk, segment, dk_XSK)
            _put_keys(dv, segment, dv_XSK)
        return dq, dk, dv, None, None


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that any of them sees."""
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, end), slice(first, end)


def _probabilities(q_XTK: torch.Tensor, k_XKS: torch.Tensor, block: int, window: int | None) -> torch.Tensor:
    """Softmax over the keys for a block's queries, which are the last of the S positions: [X, R * block, S]."""
    return quick_passes().causal_softmax_(torch.bmm(q_XTK, k_XKS), block, window, q_XTK.shape[-1] ** -0.5)


def _queries(x_NHK: torch.Tensor, groups: int, segment: Segment) -> torch.Tensor:
    """A segment's [B, G, R, S, K], a view."""
    start, count, length = segment
    x = x_NHK[start : start + count * length]
    return x.view(count, length, groups, -1, x.shape[-1]).permute(0, 2, 3, 1, 4)


def _stacked(x_BGRTK: torch.Tensor) -> torch.Tensor:
    """[X = B * G, R * T, K], contiguous."""
    B, G, R, T, K = x_BGRTK.shape
    return x_BGRTK.reshape(B * G, R * T, K)


def _keys(x_NGK: torch.Tensor, segment: Segment) -> torch.Tensor:
    """A segment's [X = B * G, S, K], contiguous."""
    start, count, length = segment
    x = x_NGK[start : start + count * length].view(count, length, *x_NGK.shape[1:])
    return x.transpose(1, 2).reshape(-1, length, x.shape[-1])


def _sums(like: torch.Tensor) -> torch.Tensor:
    """Zeros to add up in: several blocks' gradients meet in a key, in float32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _put_keys(target_NGK: torch.Tensor, segment: Segment, x_XSK: torch.Tensor) -> None:
    start, count, length = segment
    G = target_NGK.shape[1]
    part = target_NGK[start : start + count * length].view(count, length, G, -1)
    part.copy_(x_XSK.view(count, G, length, -1).transpose(1, 2))
