"""Experts behind the seam whose weights come and go: NativeExperts, and what the kernels call when one is missing.

    offload = Offload(kernels, ExpertStore(placed, budget))
    moe.experts = offload.experts(layer)                # NativeExperts' forward; prompts come this way
    offload.connect(block, layer)                       # decoding: the kernel asks between router and experts

The kernels' descriptions of a layer's experts point into the store's slots; where a record goes, its pointers follow.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import torch
from torch import nn

from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.errors import RequestError
from octad.fast.expert_store import ExpertStore, expert_records, slots_within
from octad.fast.native_modules import NativeExperts
from octad.fast.records import FILE, PlacedWeights, Records, open_records
from octad.kernels.native import FETCH, BlockStruct, NativeKernels, StoreStruct, WeightArray, describe
from octad.model.transformer import Transformer

MANY = (
    2  # (token, expert) pairs for each expert of a layer from which on a prompt will ask for all of the next
)


def memory_bytes(given: int | str) -> int:
    """Bytes of "300MB", "1.5 GiB" or a number. Raises RequestError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", str(given), re.IGNORECASE)
    if match is None:
        raise RequestError(f"--memory: found {given!r}; give bytes, such as 300MB or 1.5GB")
    power = " kmgt".index((match[2] or " ").lower())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def refuse_offload(source: TensorSource, quantize: str | None, memory: int) -> None:
    """Raises RequestError where experts cannot be read one by one within `memory` bytes: what --memory needs, and how to
    get it."""
    if not source.config.num_experts:
        raise RequestError(
            f"--memory: {source.label} is dense, it has no experts to leave on the disk; leave it out"
        )
    if not isinstance(source, QuantizedSource) or not (source.directory / FILE).is_file():
        raise RequestError(
            f"--memory: {source.label} has no {FILE} to read experts from; octad quantize ORIGINAL --to"
            f" {quantize or 'int8'} -o DIRECTORY writes a checkpoint that has"
        )
    slots_within(memory, expert_records(fitting(open_records(source), source.label)))


def fitting(records: Records | None, label: str) -> PlacedWeights:
    """The same, where they lie in a file that experts can be read from. Raises RequestError."""
    if not isinstance(records, PlacedWeights):
        raise RequestError(f"--memory: the records of {label} do not fit it; quantise it again")
    return records


def find_store(model: Transformer) -> ExpertStore | None:
    """The store that a model's experts live in; None where all are in memory."""
    found = (module.offload.store for module in model.modules() if isinstance(module, OffloadedExperts))
    return next(found, None)


class Offload:
    """The experts of one model, and the store that they live in."""

    def __init__(self, kernels: NativeKernels, store: ExpertStore) -> None:
        self.kernels, self.store = kernels, store
        self._weights: dict[int, tuple[WeightArray, ...]] = {}
        self._error: BaseException | None = None
        self._fetch = FETCH(self._bring)
        self._structs: dict[int, StoreStruct] = {}
        self._blocks: list[BlockStruct] = []  # that ask
        store.moved = self._moved
        for layer in store.layers:
            self._weights[layer] = self._described(layer)
            here, guessing = store.here[layer].ctypes.data, store.guessing.ctypes.data
            self._structs[layer] = StoreStruct(layer, here, guessing, self._fetch)

    def experts(self, layer: int) -> OffloadedExperts | None:
        """The module of a layer; None for one that is dense."""
        if layer not in self._weights:
            return None
        return OffloadedExperts(self, layer, *self._weights[layer])

    def connect(self, block: BlockStruct, layer: int) -> None:
        """Have the kernel ask for the experts of this layer."""
        block.store = ctypes.addressof(self._structs[layer])
        self._blocks.append(block)

    def after(self, layers: list[int], experts_LNA: torch.Tensor) -> None:
        """Count what a step used; once all experts are in memory to stay, the kernel need not ask. Raises what the store
        raised while the kernel ran."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.store.note(layers, experts_LNA.numpy())
        if self.store.settled:
            while self._blocks:
                self._blocks.pop().store = None

    def _described(self, layer: int) -> tuple[WeightArray, ...]:
        """Gate, up and down of a layer's experts, as if all lay in the first slot."""
        store = self.store
        parts: list[list[Any]] = [[], [], []]
        for record in store.records[layer]:
            for kind, part in zip(parts, record.parts, strict=True):
                kind.append(store.placed.placed(part.name, part, store.memory[: record.nbytes]))
        return tuple(describe(kind) for kind in parts)

    def _moved(self, layer: int, expert: int, memory: torch.Tensor) -> None:
        """A record has a new slot."""
        for weights, part in zip(self._weights[layer], self.store.records[layer][expert].parts, strict=True):
            weights.structs[expert].data = memory.data_ptr() + part.start

    def _bring(self, layer: int, experts: Any, count: int, following: Any, more: int) -> None:
        """What the kernel calls. An error waits until it has come back, with a result that nobody uses."""
        try:
            self.store.demand(layer, sorted(set(experts[:count])), sorted(set(following[:more])))
        except BaseException as error:
            self._error = error


class OffloadedExperts(NativeExperts):
    """NativeExperts that brings what it needs before it runs."""

    def __init__(
        self, offload: Offload, layer: int, gate: WeightArray, up: WeightArray, down: WeightArray
    ) -> None:
        nn.Module.__init__(self)
        self.kernels, self.gate, self.up, self.down = offload.kernels, gate, up, down
        self.offload, self.layer = offload, layer

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """As Experts.forward."""
        store = self.offload.store
        if not store.settled:
            following = range(store.E) if experts_NA.numel() >= MANY * store.E else ()
            store.demand(self.layer, torch.unique(experts_NA).tolist(), following)
        store.note([self.layer], experts_NA.numpy()[None])
        return super().forward(x_ND, weights_NA, experts_NA)
