"""Rounding a weight so that what it makes of real inputs changes least: GPTQ (arXiv 2210.17323), in closed form.

    raw, scales = round_for(weight_OK, hessian_KK, 4, 32)      # hessian: x'x summed over the inputs x that it will see

Rounding each value to the nearest step is best for inputs that have nothing to do with each other. Real ones have: what
the rounding of one input's weights does wrong, the weights of the inputs behind it can make good. So inputs are rounded
one after another, those that weigh most first, group by group, and each one's error is taken off those that are still to
come, by the share that the inverse of the Hessian tells. A group's scale is chosen when its turn comes, from what its
weights are by then: at 4 bits the best of many, each error counted by what it will cost.

Where no input was seen, or none has to do with another, this is rounding to the nearest.

Shapes: O outputs, K inputs (a multiple of the group), G groups.
"""

from __future__ import annotations

import torch

from octad.kernels.packing import quick_round_in_turn

DAMPING = 0.01  # of the Hessian's mean diagonal, added to it: inputs that were seen little move little


def round_for(
    weight_OK: torch.Tensor, hessian_KK: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned integers uint8 [O, K] and scales bfloat16 [O, G], as packed.quantize gives them."""
    order_K = heaviest_first(hessian_KK.diagonal(), group)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K])
    left_KO = weight_OK.T[order_K].float()
    raw_KO = torch.empty(left_KO.shape, dtype=torch.uint8)
    scales = torch.empty(left_KO.shape[1], len(left_KO) // group, dtype=torch.bfloat16)
    for start in range(0, len(left_KO), group):
        end, number = start + group, int(order_K[start]) // group
        inverse = factor_KK[start:end, start:end]
        raw_KO[order_K[start:end]], scales[:, number], errors = quick_round_in_turn(
            left_KO[start:end], inverse, bits
        )
        left_KO[end:].addmm_(factor_KK[start:end, end:].T, errors, alpha=-1)
    return raw_KO.T.contiguous(), scales


def heaviest_first(diagonal_K: torch.Tensor, group: int) -> torch.Tensor:
    """Inputs [K] in the order in which they are rounded: groups by their sum, and inside by their own size."""
    by_group = diagonal_K.view(-1, group)
    inside = by_group.argsort(dim=1, descending=True, stable=True)
    groups = by_group.sum(1).argsort(descending=True, stable=True)
    return (groups[:, None] * group + inside[groups]).flatten()


def inverse_factor(hessian_KK: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32 [K, K]."""
    hessian = hessian_KK.clone()
    diagonal = hessian.diagonal()
    seen = diagonal > 0
    diagonal[~seen] = 1.0
    diagonal.add_(DAMPING * diagonal[seen].mean() if seen.any() else 0.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
