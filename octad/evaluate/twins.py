"""Twin experts: two whose weights nearly agree over the layers, so that one of them may go.

    find_twins([moe.experts, ...], names)            # [{"a": "python", "b": "c", "cosine": 0.97}]

Fine-tunes of one base agree in nearly everything, so weights as they are tell nothing: each cosine is of two experts'
differences from the mean of all experts of their layer, and the answer is the mean over layers. Of E unrelated
directions it is -1 / (E - 1); of copies it is 1. Of two experts alone it would always be -1, so those whose distance is
below NEAR_COPY of their size count as copies too, whatever the rest look like.

Memory is a few blocks of BLOCK values in float32 (of packed experts, one projection unpacked); time is one product
[E, K] x [K, E] per block.

Shapes: E experts, K values of one expert's projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from octad.checkpoint.distance import cosines_from_mean
from octad.evaluate.contestants import unpacked
from octad.fast.native_modules import NativeExperts
from octad.fast.quantize import PackedExperts
from octad.model.moe import Experts

TWINS = 0.9  # mean cosine from which two experts are called twins
BLOCK = 1 << 21  # values of all experts together that are compared at a time


def find_twins(layers: Sequence[nn.Module], names: Sequence[str]) -> list[dict[str, Any]]:
    """Pairs of experts with a mean cosine of TWINS or more, the closest first; [] where weights cannot be read."""
    cosines = [cosines_of(experts) for experts in layers]
    known = [c for c in cosines if c is not None]
    if not known:
        return []
    mean_EE = torch.stack(known).mean(0)
    pairs = combinations(range(len(names)), 2)
    found = [(round(float(mean_EE[i, j]), 6), i, j) for i, j in pairs if mean_EE[i, j] >= TWINS]
    return [{"a": names[i], "b": names[j], "cosine": c} for c, i, j in sorted(found, key=lambda f: -f[0])]


def cosines_of(experts: nn.Module) -> torch.Tensor | None:
    """See cosines_from_mean, of every two experts; None where the weights cannot be read."""
    return cosines_from_mean(_blocks(experts))


def _blocks(experts: nn.Module) -> Iterator[torch.Tensor]:
    """Rows [E, K] of every expert's weights, in float32, some columns at a time."""
    if isinstance(experts, Experts):
        for weight in (experts.gate_up_proj, experts.down_proj):
            flat_EK = weight.detach().flatten(1)
            for block_EK in torch.split(flat_EK, max(1, BLOCK // len(flat_EK)), dim=1):
                yield block_EK.float()
    elif isinstance(experts, PackedExperts):
        for part in (experts.gate, experts.up, experts.down):
            yield torch.stack([packed.unpack().flatten() for packed in part])
    elif isinstance(experts, NativeExperts):
        for weights in (experts.gate, experts.up, experts.down):
            yield torch.stack([unpacked(weights, e).flatten() for e in range(len(weights.outputs))])
