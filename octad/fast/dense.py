"""The dense feed-forward network for training on CPUs, with a backward of its own.

    swap_dense(model)                       # every MLP without biases becomes a TrainMLP, which shares its layers

down(silu(gate(x)) * up(x)), a few hundred rows at a time from x to y and in the backward from dy to dx, so that what one
product writes the next one finds in the cache: 900 in place of 750 GFLOP/s on two cores. What is kept is x, gate and up;
silu(gate) * up is made again. A frozen weight's gradient is never computed; one that learns is a single product over all
rows. Low-rank changes (LowRankLinear) are part of it. Twin: MLP.

Shapes: N tokens, D model, F feed-forward hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from octad.fast.products import Products, parts_of, slices
from octad.kernels.passes import quick_passes
from octad.model.moe import MLP


class TrainMLP(nn.Module):
    """The signature of octad.model.moe.MLP; its layers are nn.Linear or LowRankLinear, without biases."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of the same shape as x, [..., D]."""
        parts, scales = parts_of(self.gate_proj, self.up_proj, self.down_proj)
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND = _Gated.apply(x_ND, scales, *parts)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, y_ND).view(x.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, scales: list[float], *given: Any) -> torch.Tensor:
        """y [N, D] of x [N, D]; weight, a, b of gate, up and down; their three scales."""
        into, down = _halves(given, scales)
        passes, N = quick_passes(), len(x_ND)
        gate_NF, up_NF = (x_ND.new_empty(N, len(weight)) for weight in into.weights)
        y_ND = x_ND.new_empty(N, len(down.weights[0]))
        thins = []
        for at in slices(slice(0, N), gate_NF):
            thins.append(into.forward(x_ND[at], gate_NF[at], up_NF[at]))
            thins.append(down.forward(passes.swiglu(gate_NF[at], up_NF[at]), y_ND[at]))
        ctx.save_for_backward(x_ND, gate_NF, up_NF, *given, *thins)
        ctx.scales = scales
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from y's; None for what is frozen."""
        dy_ND, (x_ND, gate_NF, up_NF, *rest) = grads[0].contiguous(), ctx.saved_tensors
        (into, down), thins = _halves(rest[:9], ctx.scales), iter(rest[9:])
        want_x, want = ctx.needs_input_grad[0], ctx.needs_input_grad[2::3]
        into.begin()
        down.begin()
        dx_ND = torch.empty_like(x_ND) if want_x else None
        dgate_NF, dup_NF, h_NF = (gate_NF.new_empty(gate_NF.shape if w else (0,)) for w in want)
        for at in slices(slice(0, len(x_ND)), gate_NF):
            dh = gate_NF.new_empty(gate_NF[at].shape)
            thin, dthin = (next(thins), next(thins)), down.to_inputs(dh, dy_ND[at])
            dgate = dgate_NF[at] if want[0] else torch.empty_like(dh)
            dup = dup_NF[at] if want[1] else dh
            h = quick_passes().swiglu_backward(dh, gate_NF[at], up_NF[at], dgate, dup)
            if want[2]:
                h_NF[at] = h
            down.to_factors(dthin, h, thin[1], dy_ND[at])
            dthin = into.to_inputs(None if dx_ND is None else dx_ND[at], dgate, dup)
            into.to_factors(dthin, x_ND[at], thin[0], dgate, dup)
        first = into.gradients(want[:2], x_ND, (dgate_NF, dup_NF))
        return dx_ND, None, *first, *down.gradients(want[2:], h_NF, [dy_ND])


def _halves(given: Sequence[Any], scales: Sequence[float]) -> tuple[Products, Products]:
    """Gate and up, and down."""
    return Products(given[:6], scales[:2]), Products(given[6:], scales[2:])


def swap_dense(model: nn.Module) -> None:
    """Put a TrainMLP in place of every MLP that has no biases."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, MLP) and not any(n.endswith("bias") for n, _ in child.named_parameters()):
                setattr(module, name, TrainMLP(child))
