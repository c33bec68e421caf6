"""Experts for training: the expert seam with a backward of its own.

    layer.mlp.experts = TrainExperts(layer.mlp.experts)          # shares the weights
    add_low_rank(model, "experts$", LowRankSpec(rank=16))        # lowrank.py: each expert learns a change of its own

Tokens are sorted by expert once, so that each expert multiplies one contiguous block, a few hundred rows at a time (see
products.py). Three things make its backward cheaper than autograd through the loop: a frozen weight's gradient is never
computed; nothing of the second half is kept (silu(gate) * up is made again, which costs no matmul); and a routing
weight's gradient, dy . expert(x), is taken as (dy W_down) . h, which the backward has at hand anyway. One row a choice,
[N * A], is what is stored, and about 3 % of empty rows, so that blocks have few different sizes (see sorted_choices).

Shapes: N tokens, D model, E experts, A experts a token, F feed-forward hidden, R = N * A choices in order of experts
and what fills them up, L rank of a change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.products import Products, slices
from octad.kernels.passes import quick_passes
from octad.model.moe import Experts

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
        changes = [part for p in PROJECTIONS for part in self.factors(p)] if self.scale else []
        y_RD = _SortedExperts.apply(  # type: ignore[no-untyped-call]
            x_ND.index_select(0, rows),
            weights_R,
            counts,
            self.scale,
            self.gate_up_proj,
            self.down_proj,
            *changes,
        )
        return torch.zeros_like(x_ND).index_add(0, rows, cast(torch.Tensor, y_RD))


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


class _SortedExperts(torch.autograd.Function):
    """weight * expert(x) for rows sorted by expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        weights_R: torch.Tensor,
        counts: list[int],
        scale: float,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        """y [R, D], times each row's weight; counts of E; stacks: gate_up [E, 2 F, D], down [E, D, F], and where there
        are changes A and B of the one and of the other."""
        hidden = x_RD.new_empty(len(x_RD), stacks[0].shape[1])
        y_RD, thins = torch.empty_like(x_RD), list[torch.Tensor | None]()
        for e, rows in _blocks(counts):
            gate_up, down = _products(stacks, e, scale)
            for at in slices(rows, hidden):
                thins.append(gate_up.forward(x_RD[at], hidden[at]))
                thins.append(down.forward(quick_passes().swiglu(*hidden[at].chunk(2, -1)), y_RD[at]))
        ctx.save_for_backward(x_RD, weights_R, hidden, *stacks, *thins)
        ctx.counts, ctx.scale = counts, scale
        return y_RD.mul_(weights_R[:, None])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from y's; None for what is frozen. Rows are weighted where they are narrow: x, y and thin ones."""
        want_x, want_weights, _, _, *want = ctx.needs_input_grad
        x_RD, weights_R, hidden, *kept = ctx.saved_tensors
        stacks, thins = kept[: len(want)], iter(kept[len(want) :])
        dy_RD, weights_R1 = grads[0].contiguous(), weights_R[:, None]
        weighted_RD = dy_RD * weights_R1 if any(want) else dy_RD
        dx_RD = torch.empty_like(x_RD) if want_x else None
        dweights_R = torch.empty_like(weights_R) if want_weights else None
        dstacks = [torch.zeros_like(s) if w else None for s, w in zip(stacks, want, strict=True)]
        for e, rows in _blocks(ctx.counts):
            gate_up, down = _products(stacks, e, ctx.scale)
            gate_up.begin()
            down.begin()
            dhidden = torch.empty_like(hidden[rows])
            h_RF = hidden.new_empty(len(dhidden) if want[1] else 0, hidden.shape[1] // 2)
            for at in slices(rows, hidden):
                here = slice(at.start - rows.start, at.stop - rows.start)
                weight, wide, thin = weights_R1[at], next(thins), next(thins)
                gate, up = hidden[at].chunk(2, -1)
                dh = torch.empty_like(gate, memory_format=torch.contiguous_format)
                dthin = down.to_inputs(dh, dy_RD[at])
                h = quick_passes().swiglu_backward(dh, gate, up, *dhidden[here].chunk(2, -1))
                if dweights_R is not None:
                    dweights_R[at] = torch.linalg.vecdot(dh, h)
                if want[1]:
                    h_RF[here] = h
                down.to_factors(_times(dthin, weight), h, thin, weighted_RD[at])
                dthin = gate_up.to_inputs(None if dx_RD is None else dx_RD[at], dhidden[here])
                gate_up.to_factors(_times(dthin, weight), x_RD[at], _times(wide, weight), dhidden[here])
            x = x_RD[rows] * weights_R1[rows] if want[0] else x_RD[rows]
            dgate_up, *first = gate_up.gradients(want[:1], x, [dhidden])
            ddown, *second = down.gradients(want[1:2], h_RF, [weighted_RD[rows]])
            for stack, gradient in zip(dstacks, (dgate_up, ddown, *first, *second), strict=False):
                if stack is not None and gradient is not None:
                    stack[e] = gradient
        if dx_RD is not None:
            dx_RD.mul_(weights_R1)
        return dx_RD, dweights_R, None, None, *dstacks


def _products(stacks: Sequence[torch.Tensor], expert: int, scale: float) -> tuple[Products, Products]:
    """One expert's part of _SortedExperts' stacks: gate_up's and down's."""
    gate_up, down, *factors = (stack[expert] for stack in stacks)
    a, b, c, d = factors or (None,) * 4
    return Products([gate_up, a, b], [scale]), Products([down, c, d], [scale])


def _times(thin: torch.Tensor | None, weights: torch.Tensor) -> torch.Tensor | None:
    return None if thin is None else thin * weights


def _blocks(counts: list[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and which."""
    blocks, start = [], 0
    for e, count in enumerate(counts):
        if count:
            blocks.append((e, slice(start, start + count)))
        start += count
    return blocks
