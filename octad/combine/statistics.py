"""Sufficient statistics of the routers: additive over experts, so that one expert can come or go without the others.

For expert e and layer l, over the router inputs x of its calibration runs, each with its run's weight w:
    mean_D = sum w x / sum w        gram_DD = sum w x x' / sum w
A ridge router of layer l needs the means and the *sum* of the grams over experts. Stored are just these (float32), with
the calibration tokens themselves: an expert that leaves has its gram computed again from its tokens, and taken away.

Shapes: L layers, E experts, D model.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from octad.dist import bfloat16_products
from octad.errors import OutputError

IN_MEMORY = 1 << 30  # bytes of sums; more go to the temporary directory


@dataclass
class Statistics:
    """grams_LDD: summed over experts; means_LED: one for each expert."""

    grams: torch.Tensor
    means: torch.Tensor

    @classmethod
    def zeros(cls, layers: int, experts: int, dim: int) -> Statistics:
        """Nothing seen yet."""
        return cls(room(layers, dim, dim), torch.zeros(layers, experts, dim))

    def add(self, layer: int, expert: int, x_ND: torch.Tensor, share: float) -> None:
        """Count inputs of an expert in, each with the same share, or out again with a negative one.

        The shares of all inputs of an expert add up to one."""
        add_gram(self.grams[layer], x_ND, share)
        self.means[layer, expert].add_(x_ND.sum(0, dtype=torch.float32), alpha=share)

    def moved(self, slots: Sequence[int | None]) -> Statistics:
        """The same with expert slots[e] in place e; None is a place of which nothing is seen yet.

        The gram of an expert that is left out must have been counted out before."""
        L, _, D = self.means.shape
        rows = [torch.zeros(L, D) if s is None else self.means[:, s] for s in slots]
        return Statistics(self.grams, torch.stack(rows, dim=1))


def add_gram(gram_DD: torch.Tensor, x_ND: torch.Tensor, share: float) -> None:
    """gram += share * x'x, added up in float32; products of bfloat16 inputs are exact and take half the time."""
    x = x_ND.float()
    with bfloat16_products() if x_ND.dtype == torch.bfloat16 else nullcontext():
        gram_DD.addmm_(x.T, x, alpha=share)


def pack(grams_LDD: torch.Tensor) -> torch.Tensor:
    """The lower triangles, [L, D(D+1)/2]: a gram is symmetric."""
    L, D, _ = grams_LDD.shape
    packed = room(L, D * (D + 1) // 2)
    for layer in range(L):
        start = 0
        for row in range(D):
            packed[layer, start : start + row + 1] = grams_LDD[layer, row, : row + 1]
            start += row + 1
    return packed


def room(*shape: int) -> torch.Tensor:
    """Float32 zeros; where they are many in a file without a name, whose pages the system takes back when it needs them.
    Raises OutputError where the temporary directory has no room for them."""
    size = 4 * math.prod(shape)
    if size <= IN_MEMORY or sys.platform == "win32":  # which opens no temporary file twice
        return torch.zeros(shape)
    place = tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
            return torch.from_file(file.name, shared=True, size=size // 4).view(shape)
    except OSError as error:
        raise OutputError(
            f"{place}: {size:,} bytes of router statistics cannot be put there ({error.strerror}); set TMPDIR to another"
            " directory, or fit routers by another method"
        ) from error


def unpack(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of pack, grams_LDD."""
    rows, columns = torch.tril_indices(dim, dim)
    grams = torch.zeros(len(packed), dim, dim)
    grams[:, rows, columns] = packed
    grams[:, columns, rows] = packed
    return grams
