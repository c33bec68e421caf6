"""Routers watched: which experts worked on each token, with what weight, who had the most say; and experts barred.

    with watching(model, hear):                       # hear(layer, gate, x_ND, weights_NA, experts_NA)
        model.model(tokens_1N, cache)
    experts_NLA, weights_NLA = stack(record, tokens=N)
    said(experts_NLA, weights_NLA)                    # speakers and their shares

This is the one way to watch a router: by forward hooks on whatever module is a layer's `mlp.gate` at that moment (it
returns weights_NA, experts_NA), and only while somebody asks. An engine watches every step, so that hearing must cost
little: a Watch makes its hooks once, puts them into the gates' own tables for the time of a step, and layers that decode
in one native call tell it all at once (`hear`). The same hooks bar experts to rows: a router's logits get a bias by row,
-inf for the barred ones, and the softmax divides what is left.

Layers without a router hold expert -1, weight 0.

Shapes: N tokens, L layers of the model, A experts a token, E experts, D model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from octad.model.transformer import Transformer

Routing = tuple[torch.Tensor, torch.Tensor]  # (weights_NA, experts_NA)
Hear = Callable[
    [int, Any, torch.Tensor, torch.Tensor, torch.Tensor], None
]  # layer, gate, x, weights, experts
Speaker = tuple[int, float]  # the expert with the most weight over the layers, and its share of it


def mixtures(model: Transformer) -> dict[int, Any]:
    """The feed-forward part of each layer that has a router, `gate`, in it."""
    mlps = {number: layer.mlp for number, layer in enumerate(model.model.layers)}
    return {number: mlp for number, mlp in mlps.items() if isinstance(getattr(mlp, "gate", None), nn.Module)}


@contextmanager
def watching(model: Transformer, hear: Hear) -> Iterator[None]:
    """Inside, `hear` is told of every call of a router: its layer, the router, what it read and what it chose."""

    def observe(number: int, gate: nn.Module, args: tuple[torch.Tensor, ...], out: Routing) -> None:
        hear(number, gate, args[0], *out)

    handles = [mlp.gate.register_forward_hook(partial(observe, i)) for i, mlp in mixtures(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Watch:
    """An engine's ear on the routers of its model, and the hand that bars experts to rows; for one step at a time.

    `bias_NE`: None, or what is added to the routers' logits of each row (0, or -inf for a barred expert).
    `alone_N`: None, or the one expert that each row has, where that holds for all rows.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._mlps = mixtures(model)
        self.mixed = bool(self._mlps)
        self.bias_NE: torch.Tensor | None = None
        self.alone_N: torch.Tensor | None = None
        self._record: list[Routing | None] = []
        self._whole: Routing | None = None  # of all layers at once, [L, N, A] each
        self._hooks = [_Ear(self, number) for number in self._mlps]
        self._key = object()

    @contextmanager
    def step(
        self, only: Sequence[tuple[int, Sequence[int] | None]] = (), told: Callable[[], bool] = bool
    ) -> Iterator[None]:
        """Inside, every router is heard. `only`: for runs of rows, how many and which experts they may use. `told`:
        whether the code that runs the layers calls no router, and says itself what it chose (`hear`)."""
        self._record = [None] * len(self.model.model.layers)
        self._whole = None
        self._bar(only)
        gates = [] if told() else [mlp._modules["gate"] for mlp in self._mlps.values()]
        tables: list[dict[Any, Any]] = [gate._forward_hooks for gate in gates]
        for table, hook in zip(tables, self._hooks, strict=False):
            table[self._key] = hook
        try:
            yield
        finally:
            for table in tables:
                table.pop(self._key, None)
            self.bias_NE = self.alone_N = None

    def _bar(self, only: Sequence[tuple[int, Sequence[int] | None]]) -> None:
        if all(allowed is None for _, allowed in only):
            return
        device, experts = self.model.model.norm.weight.device, self.model.config.num_experts
        rows = [_bias(allowed, experts).expand(count, -1) for count, allowed in only]
        self.bias_NE = torch.cat(rows).to(device)
        if all(allowed is not None and len(allowed) == 1 for _, allowed in only):
            self.alone_N = self.bias_NE.argmax(-1)

    def hear(self, layers: Sequence[int], weights_LNA: torch.Tensor, experts_LNA: torch.Tensor) -> None:
        """What the routers of these layers chose, from code that ran them in one call."""
        if len(layers) == len(self._record):
            self._whole = weights_LNA, experts_LNA
            return
        for place, number in enumerate(layers):
            self._record[number] = weights_LNA[place], experts_LNA[place]

    @property
    def record(self) -> list[Routing | None]:
        """What the routers of the last step chose, by layer; None where there is none."""
        return self._record

    def routing(self, tokens: int) -> Routing | None:
        """(experts_NLA, weights_NLA) of the step, on the CPU; None for a model without routers."""
        if self._whole is not None:
            weights_LNA, experts_LNA = self._whole
            return experts_LNA.transpose(0, 1).to(torch.int16), weights_LNA.transpose(0, 1)
        return stack(self._record, tokens) if any(entry is not None for entry in self._record) else None


class _Ear:
    """The hook on one layer's router. `steps` marks it: code that calls Watch.hear leaves it out."""

    steps = True

    def __init__(self, watch: Watch, number: int) -> None:
        self._watch, self._number = watch, number

    def __call__(self, gate: Any, args: tuple[torch.Tensor, ...], out: Routing) -> Routing:
        watch = self._watch
        if watch.bias_NE is not None:
            out = barred(gate, args[0], out, watch.bias_NE)
        watch._record[self._number] = out
        return out


def _bias(allowed: Sequence[int] | None, experts: int) -> torch.Tensor:
    """A row of zeros, with -inf for each expert that is not allowed."""
    bias_1E = torch.zeros(1, experts)
    if allowed is not None:
        bias_1E.fill_(-math.inf)[0, list(allowed)] = 0.0
    return bias_1E


def barred(gate: Any, x_ND: torch.Tensor, out: Routing, bias_NE: torch.Tensor) -> Routing:
    """A router's answer with a bias on its logits. Rows without one keep the answer `out` to the bit; places for which
    no expert is left go to the row's best expert with weight 0. A router without weights (a fixed one) has no logits, and
    keeps its answer."""
    if getattr(gate, "weight", None) is None:
        return out
    logits_NE = F.linear(x_ND.reshape(-1, x_ND.shape[-1]).float(), gate.weight.float())
    weights_NA, experts_NA = (logits_NE + bias_NE).softmax(-1).topk(gate.top_k, dim=-1)
    if gate.normalise:
        weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
    experts_NA = torch.where(weights_NA > 0, experts_NA, experts_NA[:, :1])
    biased_N1 = (bias_NE < 0).any(-1, keepdim=True)
    return torch.where(biased_N1, weights_NA, out[0]), torch.where(biased_N1, experts_NA, out[1])


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
    return [expert for expert, _ in said(experts_NLA, weights_NLA)]


def said(experts_NLA: torch.Tensor, weights_NLA: torch.Tensor) -> list[Speaker]:
    """Per token its speaker, and that expert's share of the weight over all layers."""
    N = len(experts_NLA)
    if not N:
        return []
    # NumPy's few passes take a quarter of PyTorch's time at one row, which is every step of decoding
    experts = experts_NLA.numpy().reshape(N, -1).clip(0)  # a layer without a router adds weight 0
    weights = weights_NLA.numpy().reshape(N, -1)
    E = int(experts.max()) + 1
    places = (experts + np.arange(0, N * E, E)[:, None]).ravel()
    shares_NE = np.bincount(places, weights.ravel(), N * E).reshape(N, E)
    most, sums = shares_NE.argmax(-1), shares_NE.sum(-1)
    found = zip(most.tolist(), shares_NE[np.arange(N), most].tolist(), sums.tolist(), strict=True)
    return [(expert, weight / total if total else 0.0) for expert, weight, total in found]


class Trace:
    """The routing of one sequence by position from `start` on, filled in as its tokens are computed."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self._length = 0  # of the rows kept
        self._experts_TLA = torch.empty(0, 0, 0, dtype=torch.int16)
        self._weights_TLA = torch.empty(0, 0, 0)

    def __len__(self) -> int:
        """Positions that are known, with those before `start`."""
        return self.start + self._length if self._length else 0

    def write(self, start: int, experts_SLA: torch.Tensor, weights_SLA: torch.Tensor) -> None:
        """Keep the rows of positions start..start+S; positions that are computed again are overwritten."""
        early = max(0, self.start - start)
        experts_SLA, weights_SLA, start = experts_SLA[early:], weights_SLA[early:], start + early - self.start
        if not len(experts_SLA):
            return
        end = start + len(experts_SLA)
        if end > len(self._experts_TLA):
            self._experts_TLA = _grown(self._experts_TLA, experts_SLA, 2 * end, -1)
            self._weights_TLA = _grown(self._weights_TLA, weights_SLA, 2 * end, 0)
        self._experts_TLA[start:end] = experts_SLA
        self._weights_TLA[start:end] = weights_SLA
        self._length = max(self._length, end)

    def rows(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts, weights) of positions start..end, or as many of them as there are yet; copied."""
        start, end = max(0, start - self.start), min(end - self.start, self._length)
        return self._experts_TLA[start:end].clone(), self._weights_TLA[start:end].clone()


def _grown(old: torch.Tensor, like: torch.Tensor, length: int, fill: int) -> torch.Tensor:
    new = torch.full((length, *like.shape[1:]), fill, dtype=like.dtype)
    if len(old):
        new[: len(old)] = old
    return new
