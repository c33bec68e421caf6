"""Routing traces: which experts worked on each token, with what weight, and who had the most say.

    with recording(model) as record:
        model.model(tokens_1N, cache)
    experts_NLA, weights_NLA = stack(record, tokens=N)
    speakers(experts_NLA, weights_NLA)

Taken by forward hooks on whatever module is a layer's `mlp.gate` at that moment (it returns weights_NA, experts_NA), and
only while somebody asks: a step without traces runs without hooks. Layers without a router hold expert -1, weight 0.

Shapes: N tokens, L layers of the model, A experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octad.model.transformer import Transformer

Routing = tuple[torch.Tensor, torch.Tensor]  # (weights_NA, experts_NA)


def mixtures(model: Transformer) -> dict[int, Any]:
    """The feed-forward part of each layer that has a router, `gate`, in it."""
    mlps = {number: layer.mlp for number, layer in enumerate(model.model.layers)}
    return {number: mlp for number, mlp in mlps.items() if isinstance(getattr(mlp, "gate", None), nn.Module)}


@contextmanager
def recording(model: Transformer) -> Iterator[list[Routing | None]]:
    """What each layer's router answers inside the block: one entry a layer, None where there is no router."""
    record: list[Routing | None] = [None] * len(model.model.layers)

    def observe(number: int, module: nn.Module, args: object, out: Routing) -> None:
        record[number] = out

    handles = [mlp.gate.register_forward_hook(partial(observe, i)) for i, mlp in mixtures(model).items()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def stack(record: list[Routing | None], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """experts_NLA in int16 and weights_NLA in float32, on the CPU; A is the most that any layer uses. At least one layer
    must have a router."""
    routed = {number: out for number, out in enumerate(record) if out is not None}
    width = max(weights.shape[-1] for weights, _ in routed.values())
    experts_NLA = torch.full((tokens, len(record), width), -1, dtype=torch.int16)
    weights_NLA = torch.zeros(tokens, len(record), width)
    layers = torch.tensor(list(routed))
    for whole, part, fill in ((weights_NLA, 0, 0), (experts_NLA, 1, -1)):
        columns = [_widened(out[part], width, fill) for out in routed.values()]
        whole.index_copy_(1, layers, torch.stack(columns, 1).to("cpu", whole.dtype))
    return experts_NLA, weights_NLA


def _widened(x_NA: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    missing = width - x_NA.shape[-1]
    return F.pad(x_NA, (0, missing), value=fill) if missing else x_NA


def speakers(experts_NLA: torch.Tensor, weights_NLA: torch.Tensor) -> list[int]:
    """Per token the expert with the most weight summed over the layers."""
    shares_NE = torch.zeros(len(experts_NLA), int(experts_NLA.max()) + 1)
    index = experts_NLA.long().clamp(min=0).flatten(1)  # a layer without a router adds weight 0
    return shares_NE.scatter_add_(1, index, weights_NLA.flatten(1)).argmax(-1).tolist()


class Trace:
    """The routing of one sequence by position, filled in as its tokens are computed."""

    def __init__(self) -> None:
        self._length = 0
        self._experts_TLA = torch.empty(0, 0, 0, dtype=torch.int16)
        self._weights_TLA = torch.empty(0, 0, 0)

    def __len__(self) -> int:
        return self._length

    def write(self, start: int, experts_SLA: torch.Tensor, weights_SLA: torch.Tensor) -> None:
        """Keep the rows of positions start..start+S; positions that are computed again are overwritten."""
        end = start + len(experts_SLA)
        if end > len(self._experts_TLA):
            self._experts_TLA = _grown(self._experts_TLA, experts_SLA, 2 * end, -1)
            self._weights_TLA = _grown(self._weights_TLA, weights_SLA, 2 * end, 0)
        self._experts_TLA[start:end] = experts_SLA
        self._weights_TLA[start:end] = weights_SLA
        self._length = max(self._length, end)

    def rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts, weights) of positions start..end, or as many of them as there are yet; copied."""
        end = min(end, self._length)
        return self._experts_TLA[start:end].clone(), self._weights_TLA[start:end].clone()


def _grown(old: torch.Tensor, like: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    new = torch.full((length, *like.shape[1:]), fill, dtype=like.dtype)
    if len(old):
        new[: len(old)] = old
    return new
