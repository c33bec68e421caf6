"""Products of one input, y_i = x W_i', with low-rank changes or without: on as many rows at a time as stay in the cache.

    q, k, v = projected(x, layer.q_proj, layer.k_proj, layer.v_proj)      # nn.Linear or LowRankLinear

A product whose rows have just been written runs at the machine's full rate, one whose rows come from memory at four
fifths of it, and the thin products of a low-rank change at a third: so those who use this walk over their rows a few
hundred at a time and do all that is to be done with them. Thin products that share their input are one. Gradients of
the factors add up in float32 at least.

Shapes: N rows, I inputs, O outputs of one layer, R ranks of all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

CACHED = 1 << 20  # numbers a slice of rows may have at the widest place
LEAST = 256  # rows below which a product's own rate falls
SIZE = 32  # few sizes, see training_experts.sorted_choices


class Products:
    """Layers of one input: weight [O, I], a [r, I] and b [O, r] of each one after another in `given` (None for both where
    there is no low-rank change), and their scales."""

    def __init__(self, given: Sequence[Any], scales: Sequence[float]) -> None:
        self.weights, self.scales, self.count = list(given[0::3]), scales, len(scales)
        pairs = enumerate(zip(given[1::3], given[2::3], strict=True))
        self.factors = {n: (a, b) for n, (a, b) in pairs if a is not None}
        self.columns, ranks = dict[int, slice](), 0
        for n, (a, _) in self.factors.items():
            self.columns[n] = slice(ranks, ranks + len(a))
            ranks += len(a)
        if self.factors:
            self.a_RI = torch.cat([a for a, _ in self.factors.values()])
            self.scaled = {n: b * scales[n] for n, (_, b) in self.factors.items()}

    def forward(self, x_NI: torch.Tensor, *ys: torch.Tensor) -> torch.Tensor | None:
        """Fills each y [N, O] with x (W + scale b a)'; returns x times all a' [N, R] where there are any."""
        for weight, y_NO in zip(self.weights, ys, strict=True):
            torch.mm(x_NI, weight.T, out=y_NO)
        if not self.factors:
            return None
        thin_NR = F.linear(x_NI, self.a_RI)
        for n, b in self.scaled.items():
            ys[n].addmm_(thin_NR[:, self.columns[n]], b.T)
        return thin_NR

    def to_inputs(self, dx_NI: torch.Tensor | None, *dys: torch.Tensor) -> torch.Tensor | None:
        """Writes x's gradient to dx, where there is one; returns that of forward's result where that exists."""
        for n, (weight, dy_NO) in enumerate(zip(self.weights, dys, strict=True)):
            if dx_NI is None:
                break
            if n:
                dx_NI.addmm_(dy_NO, weight)
            else:
                torch.mm(dy_NO, weight, out=dx_NI)
        if not self.factors:
            return None
        dthin_NR = dys[0].new_empty(len(dys[0]), len(self.a_RI))
        for n, b in self.scaled.items():
            torch.mm(dys[n], b, out=dthin_NR[:, self.columns[n]])
        if dx_NI is not None:
            dx_NI.addmm_(dthin_NR, self.a_RI)
        return dthin_NR

    def begin(self) -> None:
        """Zeros to add up the gradients of the factors in."""
        self.sums = dict[int, torch.Tensor]()
        if self.factors:
            wide = torch.promote_types(self.a_RI.dtype, torch.float32)
            self.sum_a = torch.zeros_like(self.a_RI, dtype=wide)
            self.sums = {n: b.new_zeros(b.T.shape, dtype=wide) for n, b in self.scaled.items()}

    def to_factors(
        self,
        dthin_NR: torch.Tensor | None,
        x_NI: torch.Tensor,
        thin_NR: torch.Tensor | None,
        *dys: torch.Tensor,
    ) -> None:
        """Adds up the gradients of the factors; the first from to_inputs, thin from forward."""
        if dthin_NR is not None and thin_NR is not None:
            self.sum_a.add_(torch.mm(dthin_NR.T, x_NI))
            for n, total in self.sums.items():
                total.add_(torch.mm(thin_NR[:, self.columns[n]].T, dys[n]))

    def gradients(
        self, wanted: Sequence[bool], xs: torch.Tensor, dys: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """Of weight, a and b of each, in their order: a weight's, if `wanted`, from all rows at once."""
        found = list[torch.Tensor | None]()
        for n in range(len(self.weights)):
            found.append(dys[n].T @ xs if wanted[n] else None)
            if n in self.factors:
                a, b = self.factors[n]
                found.append(self.sum_a[self.columns[n]].to(a.dtype))
                found.append(self.sums[n].T.mul(self.scales[n]).to(b.dtype))
            else:
                found += [None, None]
        return found


def projected(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """Each layer's output of the same x [..., I]: nn.Linear or LowRankLinear."""
    parts, scales = parts_of(*layers)
    x_NI = x.reshape(-1, x.shape[-1])
    outputs = cast(
        tuple[torch.Tensor, ...],
        _Projected.apply(x_NI, scales, *parts),  # type: ignore[no-untyped-call]
    )
    biases = [cast(torch.Tensor | None, getattr(layer, "base", layer).bias) for layer in layers]
    pairs = zip(outputs, biases, strict=True)
    return [(y if bias is None else y + bias).view(*x.shape[:-1], y.shape[-1]) for y, bias in pairs]


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, scales: list[float], *given: Any) -> tuple[torch.Tensor, ...]:
        """One y [N, O] for the weight, a and b of each layer."""
        products = Products(given, scales)
        ys = [x_NI.new_empty(len(x_NI), len(weight)) for weight in products.weights]
        parts = slices(slice(0, len(x_NI)), x_NI)
        thins = [products.forward(x_NI[at], *(y[at] for y in ys)) for at in parts]
        ctx.save_for_backward(x_NI, *given, *thins)
        ctx.scales = scales
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients from all y's; None for what is frozen."""
        x_NI, *rest = ctx.saved_tensors
        count = 3 * len(grads)
        products, thins, dys = (
            Products(rest[:count], ctx.scales),
            rest[count:],
            [g.contiguous() for g in grads],
        )
        products.begin()
        dx_NI = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        for at, thin in zip(slices(slice(0, len(x_NI)), x_NI), thins, strict=True):
            part = [dy[at] for dy in dys]
            dthin = products.to_inputs(None if dx_NI is None else dx_NI[at], *part)
            products.to_factors(dthin, x_NI[at], thin, *part)
        return dx_NI, None, *products.gradients(ctx.needs_input_grad[2::3], x_NI, dys)


def slices(rows: slice, widest: torch.Tensor, parts: int = 1) -> Iterator[slice]:
    """What of the rows is done at one time: on a CPU parts of nearly equal size, multiples of SIZE, that fit the cache
    where they are as wide as `widest` [N, ...], of which `parts` are written by a product each; elsewhere all."""
    count = size = rows.stop - rows.start
    if widest.device.type == "cpu":
        pieces = max(1, math.ceil(count / max(LEAST, CACHED * parts // widest.shape[1])))
        size = SIZE * math.ceil(count / pieces / SIZE)
    for start in range(rows.start, rows.stop, max(1, size)):
        yield slice(start, min(rows.stop, start + size))


def parts_of(*layers: nn.Module) -> tuple[list[torch.Tensor | None], list[float]]:
    """Weight, a and b of each layer, nn.Linear or LowRankLinear, one after another; and their scales."""
    parts, scales = list[Any](), list[float]()
    for layer in layers:
        if isinstance(layer, nn.Linear):
            parts += [layer.weight, None, None]
            scales.append(1.0)
        else:
            parts += [cast(nn.Linear, layer.base).weight, layer.lora_A, layer.lora_B]
            scales.append(cast(float, layer.scale))
    return parts, scales
