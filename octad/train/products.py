"""y = x W' and its gradients, with a low-rank change or without, on as many rows as stay in the cache.

    for at in slices(slice(0, N), width=2 * I):
        thin = product.forward(x_NI[at], y_NO[at])
    for at in slices(slice(0, N), width=2 * I):
        dthin = product.to_inputs(dy_NO[at], dx_NI[at])
        product.to_factors(dthin, dy_NO[at], x_NI[at], thin, sums)

A product whose rows have just been written runs at the machine's full rate, one whose rows come from memory at four
fifths of it, and the thin products of a low-rank change at a third: so those who use this walk over their rows a few
hundred at a time and do all that is to be done with them. Gradients of the factors add up in float32 at least.

Shapes: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

CACHED = 1 << 20  # numbers a slice of rows may have at the widest place
LEAST = 256  # rows below which a product's own rate falls
SIZE = 32  # few sizes, see experts.sorted_choices


class Product(NamedTuple):
    """Weight [O, I]; a [R, I] and b [O, R] of a low-rank change, or None."""

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0

    def forward(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor | None:
        """Fills y with x (W + scale b a)'; returns x a' [N, R] where there is a change."""
        torch.mm(x_NI, self.weight.T, out=y_NO)
        if self.a is None or self.b is None:
            return None
        thin = F.linear(x_NI, self.a)
        y_NO.addmm_(thin, self.b.T, alpha=self.scale)
        return thin

    def to_inputs(
        self, dy_NO: torch.Tensor, dx_NI: torch.Tensor | None, *, add: bool = False
    ) -> torch.Tensor | None:
        """Writes, or with `add` adds, x's gradient to dx, where there is one; returns that of x a' where that exists."""
        if dx_NI is not None:
            if add:
                dx_NI.addmm_(dy_NO, self.weight)
            else:
                torch.mm(dy_NO, self.weight, out=dx_NI)
        if self.a is None or self.b is None:
            return None
        dthin = torch.mm(dy_NO, self.b).mul_(self.scale)
        if dx_NI is not None:
            dx_NI.addmm_(dthin, self.a)
        return dthin

    def to_factors(
        self,
        dthin: torch.Tensor | None,
        dy_NO: torch.Tensor,
        x_NI: torch.Tensor,
        thin: torch.Tensor | None,
        sums: Sums,
    ) -> None:
        """Adds the gradients of a and b to `sums`."""
        if dthin is not None and thin is not None:
            sums.a.add_(torch.mm(dthin.T, x_NI))
            sums.b.add_(torch.mm(thin.T, dy_NO), alpha=self.scale)


class Sums(NamedTuple):
    """Where the gradients of a [R, I] and b (transposed, [R, O]) add up."""

    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def of(cls, product: Product) -> Sums:
        """Zeros for a product; empty ones where it has no low-rank change."""
        a, b = product.a, product.b
        if a is None or b is None:
            return cls(product.weight.new_empty(0), product.weight.new_empty(0))
        wide = torch.promote_types(a.dtype, torch.float32)
        return cls(torch.zeros_like(a, dtype=wide), b.new_zeros(b.T.shape, dtype=wide))

    def gradients(self, product: Product) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of a and b, in their dtype."""
        if product.a is None:
            return None, None
        return self.a.to(product.a.dtype), self.b.T.to(product.a.dtype)


def slices(rows: slice, width: int) -> Iterator[slice]:
    """Parts of nearly equal size, multiples of SIZE, whose `width` numbers a row fit the cache."""
    count, most = rows.stop - rows.start, max(LEAST, CACHED // width)
    parts = max(1, math.ceil(count / most))
    size = SIZE * math.ceil(count / parts / SIZE)
    for start in range(rows.start, rows.stop, max(1, size)):
        yield slice(start, min(rows.stop, start + size))


def parts_of(linear: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]:
    """A linear layer's Product, low-rank or plain."""
    if isinstance(linear, nn.Linear):
        return linear.weight, None, None, 1.0
    base, a, b, scale = linear.base, linear.lora_A, linear.lora_B, linear.scale
    assert isinstance(base, nn.Linear)
    return base.weight, a, b, scale  # type: ignore[return-value]
