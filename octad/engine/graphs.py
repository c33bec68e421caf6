"""Steps of decoding on CUDA as graphs: launched as one, recorded once for each shape.

    graphs = DecodeGraphs(model, pool, attention, watch)
    found = graphs.run(pieces)         # None: launch this step operation by operation

A step of one new token a sequence is some forty small operations a layer, and the host takes longer to launch them than a
GPU to carry them out. Nothing in it asks the host (see fast/grouped_experts.py), and its shapes follow from the number of
sequences and of their blocks alone: both are rounded up, by copies of the first sequence, which write once more what it
writes, and by blocks that no length reaches. A shape is recorded when it comes for the second time. What cannot be
recorded is never tried again. No GPU was at hand: this was shown on a pretended one, which repeats what was recorded.

Shapes: R sequences, rounded up N; W blocks a sequence, rounded up; D model, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from octad.engine.scheduler import Piece
from octad.fast.grouped_experts import GroupedExperts
from octad.fast.optimize import paged_on_gpu
from octad.kernels.paged import PagedAttention, PagedBatch
from octad.kernels.varlen import pages_suit
from octad.model.moe import MoE
from octad.model.observe import Routing, Watch
from octad.model.paged_cache import BlockPool, PagedCache
from octad.model.transformer import Transformer

log = logging.getLogger(__name__)
MOST = 64  # shapes that are kept
Key = tuple[int, int, int]


@dataclass
class Decoded:
    """What a step gives: hidden_RD, logits_RV, and of each layer what its router chose, (weights_RA, experts_RA)."""

    hidden: torch.Tensor
    logits: torch.Tensor
    record: list[Routing | None]

    def first(self, rows: int) -> Decoded:
        """Of so many sequences; the logits are the caller's own, the rest is there until the next step."""
        record = [None if r is None else (r[0][:rows], r[1][:rows]) for r in self.record]
        return Decoded(self.hidden[:rows], self.logits[:rows].clone(), record)


@dataclass
class _Recorded:
    """A graph with the tensors that it reads, and those that it writes."""

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    graph: Any = None
    outputs: Decoded | None = None

    def fill(self, arrays: Sequence[Any]) -> None:
        for tensor, array in zip(self.inputs, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array), non_blocking=True)


class DecodeGraphs:
    """The graphs of one model and block pool."""

    def __init__(
        self, model: Transformer, pool: BlockPool, attention: PagedAttention, watch: Watch, block_size: int
    ) -> None:
        self.model, self.pool, self.attention, self.watch = model, pool, attention, watch
        self.block_size = block_size
        self.device = model.model.norm.weight.device
        self.replays = 0
        self._seen: set[Key] = set()
        self._recorded: dict[Key, _Recorded] = {}
        self._off = False

    @staticmethod
    def suit(model: Transformer, attention: PagedAttention) -> bool:
        """Whether decoding this model launches what graphs can hold: on CUDA, by kernels that ask the host nothing."""
        weight, experts = model.model.norm.weight, [m.experts for m in model.modules() if isinstance(m, MoE)]
        if weight.device.type != "cuda" or attention is not paged_on_gpu:
            return False
        query = weight.new_empty(1, 1, model.config.head_dim)
        return pages_suit(query) and all(isinstance(e, GroupedExperts) for e in experts)

    def run(self, pieces: Sequence[Piece]) -> Decoded | None:
        """A step in which every sequence has one new token and gets logits. None for any other, for one whose shape is
        new, and where graphs cannot be recorded here."""
        if self._off or not all(p.count == 1 and p.last for p in pieces):
            return None
        if any(p.sequence.request.params.only_experts is not None for p in pieces):
            return None
        rows, width = even(len(pieces)), even(max(len(p.sequence.blocks) for p in pieces), 8)
        tables = self.model.model.rope.tables(max(p.start for p in pieces) + 1, self.device)
        key = (rows, width, len(tables[0]))
        entry = self._recorded.get(key)
        if entry is None and (key not in self._seen or len(self._recorded) == MOST):
            self._seen.add(key)
            return None
        arrays = self._arrays(pieces, rows, width)
        if entry is None and (entry := self._record(arrays)) is None:
            return None
        self._recorded[key] = entry
        entry.fill(arrays)
        entry.graph.replay()
        self.replays += 1
        assert entry.outputs is not None
        return entry.outputs.first(len(pieces))

    def _arrays(self, pieces: Sequence[Piece], rows: int, width: int) -> tuple[Any, Any, Any]:
        """Tokens, positions and slots [3, N]; where queries start and how long contexts are [N + 1 + N]; tables [N,
        W]."""
        padded = [*pieces, *[pieces[0]] * (rows - len(pieces))]
        tables = np.zeros((rows, width), np.int32)
        for row, piece in zip(tables, padded, strict=True):
            row[: len(piece.sequence.blocks)] = piece.sequence.blocks
        starts = np.array([piece.start for piece in padded])
        tokens = [piece.sequence.token_ids[piece.start] for piece in padded]
        blocks = tables[np.arange(rows), starts // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + starts % self.block_size
        lengths = np.concatenate((np.arange(rows + 1), starts + 1)).astype(np.int32)
        return np.stack((np.array(tokens), starts, slots)).astype(np.int64), lengths, tables

    def _record(self, arrays: tuple[Any, Any, Any]) -> _Recorded | None:
        """The graph of a step of this shape. The operations are launched once before, as PyTorch asks: what they write
        is what the step writes."""
        packed, lengths, tables = (torch.from_numpy(array).to(self.device) for array in arrays)
        entry = _Recorded((packed, lengths, tables))
        try:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._launch(entry)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            entry.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(entry.graph):
                entry.outputs = self._launch(entry)
        except RuntimeError as error:
            self._off = True
            log.warning("decoding is not recorded as a CUDA graph: %s", str(error).split("\n")[0])
            return None
        return entry

    def _launch(self, entry: _Recorded) -> Decoded:
        packed_3N, lengths, tables = entry.inputs
        rows = len(tables)
        batch = PagedBatch(lengths[: rows + 1], lengths[rows + 1 :], tables, [1] * rows, [])
        cache = PagedCache(self.pool, batch, packed_3N[1], packed_3N[2], self.attention)
        with self.watch.step():
            hidden_ND = self.model.model(packed_3N[:1], cache)[0]
        return Decoded(hidden_ND, self.model.head(hidden_ND), self.watch.record)


def even(count: int, least: int = 1) -> int:
    """`count` rounded up to a multiple of a quarter of the power of two below it: few shapes, at most a quarter more."""
    step = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step
