"""Plain generation: one prompt, one token after the other, with a contiguous cache.

    for token in generate(model, ids, max_tokens=64, eos_ids=tokenizer.eos_ids):
        token.id, token.speaker

The speaker of a token is the expert with the most routing weight over all layers while the model produced it.

Shapes: S positions, V vocabulary, E experts, A experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from octad.errors import DataError
from octad.model.cache import ContiguousCache
from octad.model.observe import watching
from octad.model.transformer import Transformer


@dataclass(frozen=True)
class Token:
    """A generated token and the expert that had the most say in it (None for a dense model)."""

    id: int
    speaker: int | None


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
) -> Iterator[Token]:
    """Yields tokens until an end token (not yielded) or `max_tokens`. Raises DataError for a prompt that is empty or
    longer than the model's context."""
    limit = model.config.max_position_embeddings
    if not prompt:
        raise DataError("the prompt is empty; give some text")
    if len(prompt) >= limit:
        raise DataError(f"the prompt has {len(prompt)} tokens, the model's context is {limit}; shorten it")
    weight = model.model.embed_tokens.weight
    length = min(limit, len(prompt) + max_tokens)
    cache = ContiguousCache(model.config, 1, length, weight.dtype, weight.device)
    draw = torch.Generator().manual_seed(seed)
    feed = torch.tensor([list(prompt)], device=weight.device)
    for _ in range(length - len(prompt)):
        with torch.inference_mode(), routing_weight(model) as shares:
            logits_V = model.head(model.model(feed, cache)[0, -1]).float().cpu()
        chosen = choose(logits_V, temperature, top_p, draw)
        if chosen in eos_ids:
            return
        yield Token(chosen, int(shares.argmax()) if len(shares) else None)
        feed = torch.tensor([[chosen]], device=weight.device)


def choose(logits_V: torch.Tensor, temperature: float, top_p: float, draw: torch.Generator) -> int:
    """The most likely id at temperature 0; otherwise a draw from the smallest set of ids with probability top_p."""
    if temperature <= 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < top_p, probabilities, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=draw)])


@contextmanager
def routing_weight(model: Transformer) -> Iterator[torch.Tensor]:
    """shares_E: the last position's routing weight of each expert, summed over the layers run inside the block."""
    shares = torch.zeros(model.config.num_experts)

    def add(layer: int, gate: Any, x_ND: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        shares.index_add_(0, experts[-1].cpu(), weights[-1].float().cpu())

    with watching(model, add):
        yield shares
