"""Sequence and Request: what the scheduler moves around. No torch.

A Request is a prompt with its sampling parameters; each of its n answers is a Sequence, which knows its tokens, how many
of them have been through the model, and which blocks of the cache hold their keys and values.

Two numbers drive everything: `len(token_ids)` (prompt and answer) and `num_computed` (how many of them are in the cache).
A running answer is one token ahead of the cache: that token is what the next step feeds.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from octad.engine.outputs import Delta, FinishReason, RequestMetrics, TokenLogprobs
    from octad.engine.params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and its answers. `arrival` counts requests (the order of service), `salt` keys its cached blocks:
    only requests of equal salt share them, and of those at most the first `max_cached` tokens are taken. `sink` hears
    every delta, whoever drives the engine."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    arrival: int = 0
    salt: bytes = b""
    text: str | None = None
    traced: bool = False  # somebody asked for the routing, and there is one
    max_cached: int | None = None
    sink: Callable[[Delta], None] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_computed: bool = False
    num_cached_tokens: int | None = (
        None  # of the prompt, found in the prefix cache when it was first looked at
    )
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index, list(self.prompt)) for index in range(self.params.n)]

    @property
    def finished(self) -> bool:
        """True once every answer has a finish_reason."""
        return all(sequence.finish_reason is not None for sequence in self.sequences)


@dataclass(eq=False)
class Sequence:
    """One answer being generated: tokens, blocks (`array("i")`, so that numpy reads it without a copy) and progress.

    `keys` are the chained hashes of its full blocks as far as they have been asked for; the first `num_shared` of its
    blocks are in the prefix cache.
    """

    request: Request
    index: int
    token_ids: list[int]
    num_computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    num_shared: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.order = (self.request.arrival, self.index)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens that the model has yet to see before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def ready(self) -> bool:
        """False for the second to n-th answer until the first has computed the prompt that they share."""
        return self.index == 0 or self.request.prompt_computed
