"""Drawing from rows of weights: what is above a floor, what it sums to, and which token a uniform number picks.

    kept_RV = keep(weights_RV, floor_R1, True, buffer.like(weights_RV))
    tokens_R = pick(kept_RV, uniforms_R)          # token v with probability kept[v] / total(kept)

Weights are unnormalised probabilities of which the largest is 1. What shapes it: passes over rows x vocabulary are all
that costs, so there are few, and none through a boolean mask. The running sum is taken over blocks and then inside one.

Shapes: R rows, V tokens (padded to whole blocks), B blocks of K tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import math

import torch
from torch import Tensor

BLOCK = 64
LEAST = 2.0**-100  # weights below this are nothing beside the largest, and dividing by it cannot overflow


def generator() -> torch.Generator:
    """A new one. PyTorch wants a module of its own for that, which a quick start has left out."""
    with contextlib.suppress(ImportError):  # versions without it need none
        importlib.import_module("torch._prims.rng_prims")
    return torch.Generator()


class Numbers:
    """Numbers in [0, 1) of one generator, in its order. Some are made ahead: a call of PyTorch costs more than they."""

    def __init__(self, source: torch.Generator) -> None:
        self._source = source
        self._ahead: list[float] = []

    def take(self) -> float:
        """The next one."""
        if not self._ahead:
            self._ahead = torch.rand(64, dtype=torch.float64, generator=self._source).tolist()[::-1]
        return self._ahead.pop()


class Buffer:
    """Memory that is used again at the next step: fresh pages of this size cost more than the arithmetic on them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def padded(self, logits_RV: Tensor) -> Tensor:
        """A float32 copy in here whose rows are whole blocks; the filling is never drawn."""
        rows, width = logits_RV.shape
        work_RV = self._take(rows, -(-width // BLOCK) * BLOCK, logits_RV.device)
        work_RV[:, :width] = logits_RV
        work_RV[:, width:] = -math.inf
        return work_RV

    def like(self, work_RV: Tensor) -> Tensor:
        """Rows of the same shape, to be written to."""
        rows, width = work_RV.shape
        return self._take(rows, width, work_RV.device)

    def _take(self, rows: int, width: int, device: torch.device) -> Tensor:
        if self._flat.device != device or len(self._flat) < rows * width:
            self._flat = torch.empty(rows * width, device=device)
        return self._flat[: rows * width].view(rows, width)


def likeliest(logits_RV: Tensor) -> Tensor:
    """tokens_R of the largest logit, of equal ones the first. On the CPU by NumPy, which is twenty times faster at it."""
    if logits_RV.device.type != "cpu":
        return logits_RV.argmax(-1)
    return torch.from_numpy(logits_RV.float().numpy().argmax(-1))


def keep(weights_RV: Tensor, floor_R1: Tensor, ties: bool, out: Tensor) -> Tensor:
    """weights / floor where weights are above the floor (or equal, with ties), else 0; into `out`.

    A division and a threshold with one number for all rows are ten times faster than a mask by rows, and as exact: the
    quotient of two float32 is 1 only where they are equal.
    """
    below_one = 1 - 2**-24
    quotient_RV = torch.div(weights_RV, floor_R1.clamp(min=LEAST), out=out)
    return torch.threshold_(quotient_RV, below_one if ties else 1.0, 0.0)


def total(weights_RV: Tensor) -> Tensor:
    """Sums of the rows, float64 [R, 1]."""
    return _block_sums(weights_RV).sum(-1, keepdim=True)


def pick(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """tokens_R: where the running sum of the weights passes the uniform number's share of their total.

    A row of zeros gives some token.
    """
    sums_RB = _block_sums(weights_RV)
    upto_RB = sums_RB.cumsum(-1)
    target_R1 = uniforms_R.to(weights_RV.device)[:, None] * upto_RB[:, -1:]
    block_R1 = torch.searchsorted(upto_RB, target_R1, right=True).clamp(max=sums_RB.shape[1] - 1)
    rest_R1 = target_R1 - (upto_RB.gather(1, block_R1) - sums_RB.gather(1, block_R1))
    index_RK = block_R1 * BLOCK + torch.arange(BLOCK, device=weights_RV.device)
    within_RK = weights_RV.gather(1, index_RK).double().cumsum(-1)
    last_R1 = within_RK[:, -1:]  # rounding may push the rest a hair past the block: its last token, then
    rest_R1 = rest_R1.clamp(min=0).minimum(last_R1.nextafter(torch.zeros_like(last_R1)))
    token_R1 = torch.searchsorted(within_RK, rest_R1, right=True).clamp(max=BLOCK - 1)
    return (block_R1 * BLOCK + token_R1)[:, 0]


def _block_sums(weights_RV: Tensor) -> Tensor:
    """Sums over blocks of tokens, in float64, so that their running sum does not drift."""
    rows, width = weights_RV.shape
    return weights_RV.view(rows, width // BLOCK, BLOCK).sum(-1).double()
