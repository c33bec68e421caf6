"""ModelRunner: from a step's pieces to logits, and the routing of a mixture.

    runner = ModelRunner(model, num_blocks=1024, block_size=16)
    ran = runner.run(pieces, traced=True)         # ran.logits: a row for each piece that is its sequence's last

One forward pass over all tokens of the step, side by side. Decoding one sequence takes a few milliseconds on a CPU and
less on an accelerator, so that what happens here counts: lists become arrays once a step, and nothing loops over tokens.

Shapes: N tokens of the step, R rows that get logits, V vocabulary, D model, L layers, A experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from octad.engine.graphs import DecodeGraphs
from octad.engine.one_call import OneCall, Stacked
from octad.engine.scheduler import Piece
from octad.kernels.drawing import Drawing
from octad.kernels.paged import PagedAttention, PagedBatch, paged_attention
from octad.model.observe import Speaker, Watch, stack
from octad.model.paged_cache import BlockPool, PagedCache
from octad.model.transformer import Transformer

Rows = tuple[Any, Any, Any]  # tokens_N, positions_N, slots_N: lists or arrays of integers


class Ran(NamedTuple):
    """What a step gives: logits_RV in the model's dtype, and, where somebody listens to a mixture, its routing; both
    are there until the next step.

    `routing` makes (experts_NLA, weights_NLA) of all N tokens. What the step knows already spares
    others finding it out: the `likeliest` token of each row (-1: no numbers), and its `speakers`.
    """

    logits: torch.Tensor
    routing: Callable[[], Stacked] | None = None
    likeliest: list[int] | None = None
    speakers: list[Speaker] | None = None


class ModelRunner:
    """A model with its block pool. `attention` is any function of paged_attention's signature; `graphs`: on CUDA,
    decode by graphs (graphs.py) where the model can."""

    def __init__(
        self,
        model: Transformer,
        num_blocks: int,
        block_size: int,
        attention: PagedAttention = paged_attention,
        graphs: bool = True,
    ) -> None:
        weight = model.model.norm.weight  # of the activations' dtype, whatever the matrices are packed into
        self.model, self.attention, self.device = model, attention, weight.device
        self.block_size = block_size
        self.watch = Watch(model)
        self.pool = BlockPool(model.config, num_blocks, block_size, weight.dtype, self.device)
        self.one_call = OneCall(model, self.pool, block_size) if OneCall.suits(model) else None
        self.drawing = None if self.one_call is None else Drawing(self.one_call.decoder.kernels.library)
        self.graphs: DecodeGraphs | None = None
        if graphs and DecodeGraphs.suit(model, attention):
            self.graphs = DecodeGraphs(model, self.pool, attention, self.watch, block_size)

    def run(
        self,
        pieces: Sequence[Piece],
        traced: bool = False,
        read: Callable[[torch.Tensor], None] | None = None,
    ) -> Ran:
        """The step; with `traced` its routing, too. `read` gets the hidden states of all tokens, [N, D], but for a step
        that decodes in one call: no token of it is a prompt's but the last."""
        if self.one_call is not None and (done := self.one_call.run(pieces)) is not None:
            routing = done.routing if traced and done.speakers else None
            return Ran(done.logits, routing, done.likeliest, done.speakers if traced else None)
        return self._run(pieces, traced, read)

    @torch.inference_mode()
    def _run(self, pieces: Sequence[Piece], traced: bool, read: Callable[[torch.Tensor], None] | None) -> Ran:
        if self.graphs is not None and (decoded := self.graphs.run(pieces)) is not None:
            if read is not None:
                read(decoded.hidden)
            heard = traced and any(entry is not None for entry in decoded.record)
            return Ran(decoded.logits, partial(stack, decoded.record, len(pieces)) if heard else None)
        tokens_1N, cache = self.prepare(pieces)
        only = [(piece.count, piece.sequence.request.params.only_experts) for piece in pieces]
        listens = None
        if self.watch.mixed and (traced or any(allowed is not None for _, allowed in only)):
            cache.watch = self.watch
            one_call = getattr(self.model.model, "in_one_call", None)
            with self.watch.step(only, bool if one_call is None else partial(one_call, cache)):
                hidden_ND = self.model.model(tokens_1N, cache)[0]
            listens = partial(self._heard, len(hidden_ND)) if traced else None
        else:
            hidden_ND = self.model.model(tokens_1N, cache)[0]
        if read is not None:
            read(hidden_ND)
        return Ran(self._logits(hidden_ND, pieces), listens)

    def _heard(self, tokens: int) -> Stacked:
        """The routing of the last step, of a mixture."""
        routing = self.watch.routing(tokens)
        assert routing is not None
        return routing

    def prepare(self, pieces: Sequence[Piece]) -> tuple[torch.Tensor, PagedCache]:
        """The model's two arguments."""
        single = all(piece.count == 1 for piece in pieces)
        rows = self._single_tokens(pieces) if single else self._chunks(pieces)
        queries = [piece.count for piece in pieces]
        contexts = [piece.start + piece.count for piece in pieces]
        batch = PagedBatch.of(queries, contexts, [p.sequence.blocks for p in pieces], self.device)
        self.model.model.rope.tables(max(contexts), self.device)
        packed_3N = torch.from_numpy(np.array(rows, np.int64)).to(self.device, non_blocking=True)
        tokens_1N, positions_N, slots_N = packed_3N[:1], packed_3N[1], packed_3N[2]
        # one sequence's positions are a range: a slice of the rotary tables does, instead of a gather a layer
        start = pieces[0].start if len(pieces) == 1 else positions_N
        return tokens_1N, PagedCache(self.pool, batch, start, slots_N, self.attention)

    def _single_tokens(self, pieces: Sequence[Piece]) -> Rows:
        """Tokens, positions and slots where every sequence has one token: plain lists are fastest."""
        size = self.block_size
        positions = [piece.start for piece in pieces]
        tokens = [piece.sequence.token_ids[piece.start] for piece in pieces]
        slots = [p.sequence.blocks[p.start // size] * size + p.start % size for p in pieces]
        return tokens, positions, slots

    def _chunks(self, pieces: Sequence[Piece]) -> Rows:
        """The same where some have many tokens: array arithmetic for each sequence."""
        parts: list[Rows] = []
        for piece in pieces:
            end = piece.start + piece.count
            positions = np.arange(piece.start, end)
            blocks = np.frombuffer(piece.sequence.blocks, np.int32)[positions // self.block_size]
            slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
            parts.append((np.array(piece.sequence.token_ids[piece.start : end]), positions, slots))
        tokens, positions, slots = (np.concatenate(column) for column in zip(*parts, strict=True))
        return tokens, positions, slots

    def _logits(self, hidden_ND: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """logits_RV of the last token of each piece that ends its sequence."""
        ends = accumulate(piece.count for piece in pieces)
        rows = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.last]
        if not rows:
            return hidden_ND.new_empty(0, self.model.config.vocab_size)
        if len(rows) < len(hidden_ND):
            hidden_ND = hidden_ND.index_select(0, torch.tensor(rows, device=self.device))
        return self.model.head(hidden_ND)
