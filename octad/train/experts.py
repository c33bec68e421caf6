"""Experts for training: the expert seam with a backward of its own.

    layer.mlp.experts = TrainExperts(layer.mlp.experts)          # shares the weights

Tokens are sorted by expert once, so that each expert multiplies one contiguous block. Three things make its backward
cheaper than autograd through the loop: a frozen weight's gradient is never computed; nothing of the second half is kept
(silu(gate) * up is made again, which costs no matmul); and a routing weight's gradient, dy . expert(x), is taken as
(dy W_down) . h, which the backward has at hand anyway. One row a choice, [N * A], is what is stored.

Shapes: N tokens, D model, E experts, A experts a token, F feed-forward hidden, R = N * A choices in order of experts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.model.moe import Experts


class TrainExperts(nn.Module):
    """The signature of octad.model.moe.Experts; choices of expert -1 (dropped) cost nothing."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, y_ND."""
        flat = experts_NA.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat + 1, minlength=len(self.gate_up_proj) + 1).tolist()
        order = order[counts[0] :]  # dropped choices come first
        rows = order // experts_NA.shape[1]
        weights_R = weights_NA.flatten()[order].to(x_ND.dtype)
        y_RD = _SortedExperts.apply(  # type: ignore[no-untyped-call]
            x_ND.index_select(0, rows), weights_R, self.gate_up_proj, self.down_proj, counts[1:]
        )
        return torch.zeros_like(x_ND).index_add(0, rows, cast(torch.Tensor, y_RD))


class _SortedExperts(torch.autograd.Function):
    """weight * expert(x) for rows sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        weights_R: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        """y [R, D], times each row's weight; gate_up [E, 2 F, D], down [E, D, F], counts of E."""
        hidden = x_RD.new_empty(len(x_RD), gate_up.shape[1])
        y_RD = torch.empty_like(x_RD)
        for e, at in _blocks(counts):
            torch.mm(x_RD[at], gate_up[e].T, out=hidden[at])
            gate, up = hidden[at].chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up), down[e].T, out=y_RD[at])
        ctx.save_for_backward(x_RD, weights_R, gate_up, down, hidden)
        ctx.counts = counts
        return y_RD.mul_(weights_R[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from y's; None for what is frozen."""
        x_RD, weights_R, gate_up, down, hidden = ctx.saved_tensors
        want_x, want_weights, want_gate_up, want_down, _ = ctx.needs_input_grad
        (dy_RD,) = grads
        dx_RD = torch.empty_like(x_RD) if want_x else None
        dweights_R = torch.empty_like(weights_R) if want_weights else None
        dgate_up = torch.zeros_like(gate_up) if want_gate_up else None
        ddown = torch.zeros_like(down) if want_down else None
        for e, at in _blocks(ctx.counts):
            gate, up = hidden[at].chunk(2, -1)
            silu, scale = F.silu(gate), weights_R[at, None]
            h, dh = silu * up, dy_RD[at] @ down[e]
            if dweights_R is not None:
                dweights_R[at] = torch.linalg.vecdot(dh, h)
            if ddown is not None:
                torch.mm((dy_RD[at] * scale).T, h, out=ddown[e])
            dhidden = torch.empty_like(hidden[at])
            dgate, dup = dhidden.chunk(2, -1)
            torch.mul(dh.mul_(scale), silu, out=dup)
            torch.mul(dh, up, out=dgate)
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
            if dgate_up is not None:
                torch.mm(dhidden.T, x_RD[at], out=dgate_up[e])
            if dx_RD is not None:
                torch.mm(dhidden, gate_up[e], out=dx_RD[at])
        return dx_RD, dweights_R, dgate_up, ddown, None


def _blocks(counts: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    blocks, start = [], 0
    for e, count in enumerate(counts):
        if count:
            blocks.append((e, slice(start, start + count)))
        start += count
    return blocks
