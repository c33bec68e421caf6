"""Feed-forward networks for training, with a backward of their own: the expert seam, and the dense network as one expert.

    layer.mlp.experts = TrainExperts(layer.mlp.experts)          # shares the weights
    add_low_rank(model, "experts$", LowRankSpec(rank=16))        # lowrank.py: each expert learns a change of its own
    swap_dense(model)                       # every MLP without biases becomes a TrainMLP, which shares its layers

Tokens are sorted by expert once, so that each expert multiplies one contiguous block, from x to y and in the backward
from dy to dx a few hundred rows at a time, so that what one product writes the next one finds in the cache (see
products.py). Four things make its backward cheaper than autograd through the loop: a frozen weight's gradient is never
computed; one that learns is a single product over all rows of its block; nothing of the second half is kept (silu(gate) *
up is made again, which costs no matmul); and a routing weight's gradient, dy . expert(x), is taken as (dy W_down) . h,
which the backward has at hand anyway. One row a choice, [N * A], is what is stored, and about 3 % of empty rows, so that
blocks have few different sizes (see sorted_choices). Twins: Experts, MLP.

Shapes: N tokens, D model, E experts, A experts a token, F feed-forward hidden, R = N * A choices in order of experts
and what fills them up, L rank of a change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.products import Products, parts_of, slices
from octad.kernels.passes import quick_passes
from octad.model.moe import MLP, Experts

PROJECTIONS = ("gate_up", "down")
FEW = 16  # sizes of an expert's block up to the mean load


class TrainExperts(nn.Module):
    """The signature of octad.model.moe.Experts; choices of expert -1 (dropped) cost nothing."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.scale = 0.0

    def change(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> None:
        """Learn W + scale * B A of each stack: by projection, A [E, L, in] and B [E, out, L]."""
        self.scale = scale
        for projection, pair in factors.items():
            for letter, value in zip("AB", pair, strict=True):
                self.register_parameter(f"{projection}_lora_{letter}", nn.Parameter(value))

    def factors(self, projection: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a stack that changes."""
        return getattr(self, f"{projection}_lora_A"), getattr(self, f"{projection}_lora_B")

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, y_ND."""
        order, counts = sorted_choices(experts_NA, len(self.gate_up_proj))
        rows = (order // experts_NA.shape[1]).clamp_max_(len(x_ND) - 1)
        weights_R = F.pad(weights_NA.flatten(), (0, 1))[order].to(x_ND.dtype)
        stacks = (self.gate_up_proj, self.down_proj)
        changes = [self.factors(p) if self.scale else (None, None) for p in PROJECTIONS]
        given = [part for stack, pair in zip(stacks, changes, strict=True) for part in (stack, *pair)]
        x_RD = x_ND.index_select(0, rows)
        y_RD = _Gated.apply(x_RD, weights_R, counts, [self.scale] * 2, *given)  # type: ignore[no-untyped-call]
        return torch.zeros_like(x_ND).index_add(0, rows, cast(torch.Tensor, y_RD))


class TrainMLP(nn.Module):
    """The signature of octad.model.moe.MLP; its layers are nn.Linear or LowRankLinear, without biases."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of the same shape as x, [..., D]."""
        parts, scales = parts_of(self.gate_proj, self.up_proj, self.down_proj)
        x_ND = x.reshape(-1, x.shape[-1])
        given = [None if part is None else part[None] for part in parts]  # a stack of one
        y_ND = _Gated.apply(x_ND, None, [len(x_ND)], scales, *given)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, y_ND).view(x.shape)


def swap_dense(model: nn.Module) -> None:
    """Put a TrainMLP in place of every MLP that has no biases."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, MLP) and not any(n.endswith("bias") for n, _ in child.named_parameters()):
                setattr(module, name, TrainMLP(child))


def sorted_choices(experts_NA: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """Choices [N * A] in order of experts, without dropped ones, and how many rows each expert has.

    Each expert's rows are filled up, by the choice N * A that does not exist, to multiples of a power of two, about a
    twentieth of the mean load: a library that makes a kernel for every new number of rows then sees few of them."""
    flat = experts_NA.flatten()
    multiple = 1 << max(0, (len(flat) // (FEW * experts)).bit_length() - 1)
    dropped, *counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    filled = [-(count // -multiple) * multiple for count in counts]
    order = flat.new_full((sum(filled),), len(flat))
    chosen = torch.argsort(flat, stable=True)[dropped:]
    for block, own in zip(torch.split(order, filled), torch.split(chosen, counts), strict=True):
        block[: len(own)] = own
    return order, filled


class _Gated(torch.autograd.Function):
    """weight * down(silu(gate(x)) * up(x)), block of rows by block, each by a network of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        weights_R: torch.Tensor | None,
        counts: list[int],
        scales: list[float],
        *given: Any,
    ) -> torch.Tensor:
        """y [R, D], times each row's weight where there are some; counts of E; `given`: of each layer, gate and up apart
        or as one and then down, the stacks of weights [E, out, in] and of A and B (None without a change); its scale."""
        hidden = x_RD.new_empty(len(x_RD), sum(stack.shape[1] for stack in given[:-3:3]))
        y_RD, thins = torch.empty_like(x_RD), list[torch.Tensor | None]()
        for e, rows in _blocks(counts):
            into, down = _products(given, scales, e)
            for at in slices(rows, hidden, into.count):
                thins.append(into.forward(x_RD[at], *hidden[at].chunk(into.count, -1)))
                thins.append(down.forward(quick_passes().swiglu(*hidden[at].chunk(2, -1)), y_RD[at]))
        ctx.save_for_backward(x_RD, weights_R, hidden, *given, *thins)
        ctx.counts, ctx.scales = counts, scales
        return y_RD if weights_R is None else y_RD.mul_(weights_R[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from y's; None for what is frozen. Rows are weighted where they are narrow: x, y and thin ones."""
        want_x, want_weights, _, _, *want = ctx.needs_input_grad
        x_RD, weights_R, hidden, *kept = ctx.saved_tensors
        given, thins, dy_RD = kept[: len(want)], iter(kept[len(want) :]), grads[0].contiguous()
        weights_R1 = None if weights_R is None else weights_R[:, None]
        weighted_RD = _times(dy_RD, weights_R1) if any(want) else dy_RD
        dx_RD = torch.empty_like(x_RD) if want_x else None
        dweights_R = torch.empty_like(weights_R) if want_weights else None
        found = [
            torch.zeros_like(s) if w and (len(s) > 1 or not sum(ctx.counts)) else None
            for s, w in zip(given, want, strict=True)
        ]
        for e, rows in _blocks(ctx.counts):
            into, down = _products(given, ctx.scales, e)
            into.begin()
            down.begin()
            want_into, want_down = any(want[:-3:3]), want[-3]
            wide_RF = hidden.new_empty((rows.stop - rows.start) * want_into, hidden.shape[1])
            h_RF = hidden.new_empty((rows.stop - rows.start) * want_down, hidden.shape[1] // 2)
            for at in slices(rows, hidden, into.count):
                here = slice(at.start - rows.start, at.stop - rows.start)
                weight = None if weights_R1 is None else weights_R1[at]
                thin_into, thin_down = next(thins), next(thins)
                gate, up = hidden[at].chunk(2, -1)
                dh = torch.empty_like(gate, memory_format=torch.contiguous_format)
                wide = wide_RF[here] if want_into else hidden.new_empty(hidden[at].shape)
                dthin = down.to_inputs(dh, dy_RD[at])
                h = quick_passes().swiglu_backward(dh, gate, up, *wide.chunk(2, -1))
                if dweights_R is not None:
                    dweights_R[at] = torch.linalg.vecdot(dh, h)
                if want_down:
                    h_RF[here] = h
                down.to_factors(_times(dthin, weight), h, thin_down, weighted_RD[at])
                parts = wide.chunk(into.count, -1)
                dthin = into.to_inputs(None if dx_RD is None else dx_RD[at], *parts)
                into.to_factors(_times(dthin, weight), x_RD[at], _times(thin_into, weight), *parts)
            x = _times(x_RD[rows], None if weights_R1 is None else weights_R1[rows]) if want_into else x_RD
            first = into.gradients(want[:-3:3], x, wide_RF.chunk(into.count, -1))
            for n, gradient in enumerate(first + down.gradients(want[-3:-2], h_RF, [weighted_RD[rows]])):
                if want[n] and gradient is not None:
                    found[n] = _put(found[n], e, gradient)
        if dx_RD is not None and weights_R1 is not None:
            dx_RD.mul_(weights_R1)
        return dx_RD, dweights_R, None, None, *found


def _put(stack: torch.Tensor | None, expert: int, gradient: torch.Tensor) -> torch.Tensor:
    """The stack with an expert's gradient in its place; a stack of one is that gradient."""
    if stack is None:
        return gradient[None]
    stack[expert] = gradient
    return stack


def _products(given: Sequence[Any], scales: Sequence[float], expert: int) -> tuple[Products, Products]:
    """One network's part of what _Gated is given: what makes gate and up, and down."""
    parts = [None if stack is None else stack[expert] for stack in given]
    return Products(parts[:-3], scales[:-1]), Products(parts[-3:], scales[-1:])


def _times(rows: torch.Tensor | None, weights: torch.Tensor | None) -> Any:
    return rows if rows is None or weights is None else rows * weights


def _blocks(counts: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    blocks, start = [], 0
    for e, count in enumerate(counts):
        if count:
            blocks.append((e, slice(start, start + count)))
        start += count
    return blocks
