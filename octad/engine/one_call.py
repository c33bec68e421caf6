"""Steps of decoding on the CPU as one call of the kernels: from ids to logits, the likeliest tokens and who speaks.

    steps = OneCall(model, pool, block_size)
    ran = steps.run(pieces)             # None: run this step module by module

A step reads all active weights, after which nothing else is left in the processor's caches: every object that Python
touches between two of them is read from memory, and a few dozen small operations cost a tenth of the step. So what the
call is told lies in arrays that are made once for a number of sequences and changed in place. The modules are the slow
twin, and give the same bits; they run what has a prompt in it, routers that are not the model's own or that somebody
listens to, and requests for certain experts.

Shapes: R sequences, L layers, A experts a token, V vocabulary.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from octad.engine.scheduler import Piece
from octad.fast.native_layer import Alike, NativeDecoder
from octad.fast.native_modules import NarrowEmbedding, NativeLinear, NativeNorm
from octad.kernels.calls import DTYPES
from octad.kernels.native import EndsStruct, StepStruct
from octad.model.observe import Speaker
from octad.model.paged_cache import BlockPool
from octad.model.transformer import Transformer

Stacked = tuple[torch.Tensor, torch.Tensor]  # experts_RLA, weights_RLA


class OneCall:
    """The steps of one native model and block pool."""

    def __init__(self, model: Transformer, pool: BlockPool, block_size: int) -> None:
        self.model, self.pool, self.block_size = model, pool, block_size
        self.decoder = cast(NativeDecoder, model.model)
        self._made: _Arrays | None = None

    @staticmethod
    def suits(model: Transformer) -> bool:
        """Whether the model's ends are the kernels', too."""
        decoder, head = model.model, model.lm_head
        if not isinstance(decoder, NativeDecoder) or not isinstance(decoder.norm, NativeNorm):
            return False
        given = decoder.embed_tokens
        known = type(given) in (nn.Embedding, NarrowEmbedding) and given.weight.dtype in DTYPES
        return known and isinstance(head, NativeLinear) and head.bias is None

    def run(self, pieces: Sequence[Piece]) -> Decoded | None:
        """A step in which every sequence has one new token and gets logits; None for any other, and where the layers do
        not run in one call."""
        for piece in pieces:
            if piece.count != 1 or not piece.last or piece.sequence.request.params.only_experts is not None:
                return None
        alike = self.decoder.alike(self.pool)
        if alike is None:
            return None
        made = self._made
        if made is None or not made.serves(len(pieces), alike):
            made = self._made = _Arrays(self.model, alike, len(pieces), self.block_size)
        made.fill(pieces)
        return made.run(alike)


class Decoded(NamedTuple):
    """What a step gives: logits_RV, the likeliest tokens (-1: no numbers), and of a mixture how it was routed."""

    logits: torch.Tensor
    likeliest: list[int]
    speakers: list[Speaker] | None
    arrays: _Arrays

    def routing(self) -> Stacked:
        """(experts, weights) of the step; to be asked for before the next one."""
        made = self.arrays
        return made.experts_LRA.transpose(0, 1).to(torch.int16), made.weights_LRA.transpose(0, 1).clone()


def _ends_weights(model: Transformer) -> tuple[Any, Any, Any]:
    """What the call is given by its address, beside the layers': embeddings, the last norm and the head."""
    return model.model.embed_tokens.weight, model.model.norm.weight, cast(NativeLinear, model.lm_head).weight


class _Arrays:
    """What the call reads and writes, for R sequences."""

    def __init__(self, model: Transformer, alike: Alike, rows: int, block_size: int) -> None:
        self.rows, self.block_size, self.alike = rows, block_size, alike
        self.model, self.kernels = model, cast(NativeDecoder, model.model).kernels
        dtype = model.model.norm.weight.dtype
        self.logits_RV = torch.empty(rows, model.config.vocab_size, dtype=dtype)
        shape = (len(alike.layers), rows, alike.top_k)
        self.weights_LRA, self.experts_LRA = torch.ones(shape), torch.zeros(shape, dtype=torch.int64)
        integers = ctypes.c_int64 * rows
        self.tokens, self.positions, self.slots = integers(), integers(), integers()
        self.likeliest, self.speakers, self.shares = integers(), integers(), (ctypes.c_double * rows)()
        self.lengths = (ctypes.c_int32 * rows)()
        self._blocks: list[array[int] | None] = [None] * rows  # as they stand in the tables
        self._counts = [0] * rows
        self._step = StepStruct(
            dtype=DTYPES[dtype],
            R=rows,
            block_size=block_size,
            given=alike.kind != "routed",
            positions=ctypes.addressof(self.positions),
            slots=ctypes.addressof(self.slots),
            lengths=ctypes.addressof(self.lengths),
        )
        self._held = _ends_weights(model)
        self._ends = self._ends_of(model)
        self._step_at, self._ends_at = ctypes.addressof(self._step), ctypes.addressof(self._ends)
        self._turn: tuple[torch.Tensor, ...] = ()  # cosines and sines
        self._known = 0  # of so many positions
        self._widen(16)

    def serves(self, rows: int, alike: Alike) -> bool:
        """Whether these arrays are those of such a step, and of the weights that stand at the model's ends."""
        if rows != self.rows or alike[:3] != self.alike[:3]:
            return False
        return all(map(is_, _ends_weights(self.model), self._held))

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Say where the step's tokens stand."""
        size, most = self.block_size, 0
        for row, piece in enumerate(pieces):
            start, blocks = piece.start, piece.sequence.blocks
            if blocks is not self._blocks[row] or len(blocks) != self._counts[row]:
                self._write(row, blocks)
            self.tokens[row] = piece.sequence.token_ids[start]
            self.positions[row], self.lengths[row] = start, start + 1
            self.slots[row] = blocks[start // size] * size + start % size
            most = max(most, start)
        if most >= self._known:
            cos, sin = self._turn = self.model.model.rope.tables(most + 1, torch.device("cpu"))
            self._known, self._step.cosines, self._step.sines = len(cos), cos.data_ptr(), sin.data_ptr()

    def run(self, alike: Alike) -> Decoded:
        """The call."""
        self.kernels.decode(alike.array, self._step_at, self._ends_at, self.weights_LRA, self.experts_LRA)
        if (offload := alike.layers[0].offload) is not None:
            offload.after(alike.numbers, self.experts_LRA)
        speakers = None
        if alike.kind == "routed":
            speakers = list(zip(self.speakers, self.shares, strict=True))
        return Decoded(self.logits_RV, list(self.likeliest), speakers, self)

    def _ends_of(self, model: Transformer) -> EndsStruct:
        decoder, head = model.model, cast(NativeLinear, model.lm_head)
        return EndsStruct(
            tokens=ctypes.addressof(self.tokens),
            embedding=decoder.embed_tokens.weight.data_ptr(),
            norm=decoder.norm.weight.data_ptr(),
            head=head.weight.address,
            logits=self.logits_RV.data_ptr(),
            likeliest=ctypes.addressof(self.likeliest),
            speakers=ctypes.addressof(self.speakers),
            shares=ctypes.addressof(self.shares),
            embedding_dtype=DTYPES[decoder.embed_tokens.weight.dtype],
            eps=decoder.norm.eps,
        )

    def _write(self, row: int, blocks: array[int]) -> None:
        """A sequence's blocks into its row of the tables, where they have changed."""
        if len(blocks) > self._tables.shape[1]:
            self._widen(2 * len(blocks))
        self._tables[row, : len(blocks)] = blocks
        self._blocks[row], self._counts[row] = blocks, len(blocks)

    def _widen(self, width: int) -> None:
        tables: Any = np.zeros((self.rows, width), np.int32)
        for row, blocks in enumerate(self._blocks):
            if blocks is not None:
                tables[row, : self._counts[row]] = blocks[: self._counts[row]]
        self._tables = tables
        self._step.width, self._step.tables = width, tables.ctypes.data
