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

from octad.kernels.passes import quick_passes
from octad.model.moe import MLP
from octad.train.products import Product, Sums, parts_of, slices


class TrainMLP(nn.Module):
    """The signature of octad.model.moe.MLP; its layers are nn.Linear or LowRankLinear, without biases."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of the same shape as x, [..., D]."""
        gate, up, down = (parts_of(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj))
        scales = (gate[3], up[3], down[3])
        x_ND = x.reshape(-1, x.shape[-1])
        y_ND = _Gated.apply(x_ND, *gate[:3], *up[:3], *down[:3], scales)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, y_ND).view(x.shape)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, *given: Any) -> torch.Tensor:
        """y [N, D] of x [N, D]; weight, a, b of gate, up and down; their three scales."""
        gate, up, down = _products(given[:-1], given[-1])
        passes, N = quick_passes(), len(x_ND)
        gate_NF, up_NF = (x_ND.new_empty(N, len(p.weight)) for p in (gate, up))
        y_ND = x_ND.new_empty(N, len(down.weight))
        thins = []
        for at in slices(slice(0, N), len(gate.weight)):
            x = x_ND[at]
            thins += [gate.forward(x, gate_NF[at]), up.forward(x, up_NF[at])]
            thins.append(down.forward(passes.swiglu(gate_NF[at], up_NF[at]), y_ND[at]))
        ctx.save_for_backward(x_ND, gate_NF, up_NF, *thins, *given[:-1])
        ctx.scales = given[-1]
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from y's; None for what is frozen."""
        (dy_ND,), (x_ND, gate_NF, up_NF, *rest) = grads, ctx.saved_tensors
        thins, (gate, up, down) = iter(rest[:-9]), _products(rest[-9:], ctx.scales)
        want_x, want = ctx.needs_input_grad[0], ctx.needs_input_grad[1:10:3]
        dy_ND = dy_ND.contiguous()
        sums = [Sums.of(p) for p in (gate, up, down)]
        dx_ND = torch.empty_like(x_ND) if want_x else None
        dgate_NF, dup_NF, h_NF = (gate_NF.new_empty(gate_NF.shape if w else (0,)) for w in want)
        for at in slices(slice(0, len(x_ND)), gate_NF.shape[1]):
            thin = [next(thins) for _ in range(3)]
            x, dy, dx = x_ND[at], dy_ND[at], None if dx_ND is None else dx_ND[at]
            dh = gate_NF.new_empty(gate_NF[at].shape)
            dthin = down.to_inputs(dy, dh)
            dgate = dgate_NF[at] if want[0] else torch.empty_like(dh)
            dup = dup_NF[at] if want[1] else torch.empty_like(dh)
            h = quick_passes().swiglu_backward(dh, gate_NF[at], up_NF[at], dgate, dup)
            if want[2]:
                h_NF[at] = h
            down.to_factors(dthin, dy, h, thin[2], sums[2])
            gate.to_factors(gate.to_inputs(dgate, dx), dgate, x, thin[0], sums[0])
            up.to_factors(up.to_inputs(dup, dx, add=True), dup, x, thin[1], sums[1])
        outs, ins = (dgate_NF, dup_NF, dy_ND), (x_ND, x_ND, h_NF)
        found: list[torch.Tensor | None] = [dx_ND]
        for n, product in enumerate((gate, up, down)):
            found += [outs[n].T @ ins[n] if want[n] else None, *sums[n].gradients(product)]
        return (*found, None)


def _products(given: Sequence[Any], scales: Sequence[float]) -> list[Product]:
    """Of gate, up and down, from the weight, a and b of each and the three scales."""
    return [
        Product(given[3 * n], given[3 * n + 1], given[3 * n + 2], scale) for n, scale in enumerate(scales)
    ]


def swap_dense(model: nn.Module) -> None:
    """Put a TrainMLP in place of every MLP that has no biases."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, MLP) and not any(n.endswith("bias") for n, _ in child.named_parameters()):
                setattr(module, name, TrainMLP(child))
