"""Scheduler: which tokens of which sequences go through the model in the next step. No torch.

    scheduler.add(request)
    for piece in scheduler.schedule(): ...run tokens piece.start .. piece.start + piece.count of piece.sequence...
    scheduler.computed(pieces); ...append sampled tokens...; scheduler.finish(sequence)

A step is bound by reading the weights while it has few tokens, so that all running answers and a chunk of a new prompt
share one (continuous batching with chunked prefill, arXiv 2308.16369). First every decoding answer gets its token, then
prompts get what is left of `max_tokens`. Service is first come, first served: nobody overtakes a prompt that waits for
blocks, and when blocks run out the youngest sequence gives its own back and is computed again later, so that the oldest
always moves on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

from octad.engine.block_manager import BlockManager
from octad.engine.sequence import Request, Sequence


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start .. start + count of one sequence; `last` where the next token can be sampled after them."""

    sequence: Sequence
    start: int
    count: int
    last: bool


class Scheduler:
    """Waiting and running sequences, both in order of arrival."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_tokens: int) -> None:
        self.blocks, self.max_tokens = blocks, max_tokens
        self.max_num_seqs = min(max_num_seqs, max_tokens)  # so that every running sequence gets a token
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = self.prefix_hit_tokens = 0

    def add(self, request: Request) -> None:
        """Queue all sequences of a request."""
        for sequence in request.sequences:
            insort(self.waiting, sequence, key=_order)

    def schedule(self) -> list[Piece]:
        """The next step's pieces, decoding ones first; [] only where nothing waits or runs."""
        pieces = self._decodes()
        budget = self.max_tokens - len(pieces)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                budget -= _cut(pieces, sequence, budget)
        self._admit(pieces, budget)
        return pieces

    def computed(self, pieces: Sequence_[Piece]) -> None:
        """Count the tokens of a step that has run, and let others reuse the blocks that it filled."""
        for piece in pieces:
            sequence = piece.sequence
            sequence.num_computed += piece.count
            self.blocks.share(sequence)
            if sequence.num_computed >= len(sequence.request.prompt):
                sequence.request.prompt_computed = True

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence that is done or aborted, wherever it is."""
        for queue in (self.running, self.waiting):
            if sequence in queue:
                queue.remove(sequence)
        self.blocks.deallocate(sequence)

    # ---- one step ------------------------------------------------------------------------------------------

    def _decodes(self) -> list[Piece]:
        pieces: list[Piece] = []
        for sequence in list(self.running):
            if sequence.remaining == 1 and self._make_room(sequence):
                _cut(pieces, sequence, 1)
        return pieces

    def _make_room(self, sequence: Sequence) -> bool:
        """Room for the newest token, if need be from the youngest; False where the sequence had to give way itself."""
        while not self.blocks.may_append(sequence):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        self.blocks.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.deallocate(sequence)
        insort(self.waiting, sequence, key=_order)
        self.preemptions += 1

    def _admit(self, pieces: list[Piece], budget: int) -> None:
        """Start waiting sequences while there is budget, a place, and room for all their tokens. One spare block for
        each running sequence keeps a new one from being preempted at once."""
        i = 0
        while i < len(self.waiting) and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[i]
            if not sequence.ready:
                i += 1
                continue
            if not self.blocks.can_allocate(sequence, spare=len(self.running)):
                return
            del self.waiting[i]
            hit = self.blocks.allocate(sequence)
            self.prefix_hit_tokens += hit
            if sequence.request.num_cached_tokens is None:
                sequence.request.num_cached_tokens = hit
            insort(self.running, sequence, key=_order)
            budget -= _cut(pieces, sequence, budget)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _cut(pieces: list[Piece], sequence: Sequence, budget: int) -> int:
    """Add as much of a sequence as the budget allows; returns how many tokens that is."""
    count = min(sequence.remaining, budget)
    pieces.append(Piece(sequence, sequence.num_computed, count, count == sequence.remaining))
    return count
