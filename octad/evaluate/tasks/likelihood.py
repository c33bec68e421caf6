"""How likely a model finds a continuation of a text: what multiple choice and continuation tasks ask.

    pairs = [encode_pair(tokenizer, "The capital of France is", " Paris")]
    log_likelihoods(model, pairs)[0].nats

A pair is cut into tokens as lm-eval does it (`TemplateLM._encode_pair`): both texts together, blanks at the end of the
context count as the continuation's, and the continuation is what comes after as many tokens as the context alone has.
Prefill is bound by arithmetic, so pairs go through the model in batches of like length; the head, which is a fifth of a
small model's work, runs on the continuations' positions only.

Shapes: B pairs, S positions, P positions of continuations, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octad.errors import DataError
from octad.evaluate.nats import head_rows
from octad.model.transformer import Transformer
from octad.telling import Share
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window, batches

Pair = tuple[Sequence[int], Sequence[int]]  # the context's ids (one at least), the continuation's


@dataclass(frozen=True)
class Likelihood:
    """nats: -ln p(continuation | context). greedy: whether each of its tokens is the model's first choice."""

    nats: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of both. An empty context is the model's begin (or end) token."""
    if not context:
        return begin_ids(tokenizer), tokenizer.encode(continuation, parse_special=False)
    bare = context.rstrip()
    before, whole = tokenizer.encode_prompt(bare), tokenizer.encode_prompt(context + continuation)
    return whole[: len(before)] or begin_ids(tokenizer), whole[len(before) :]


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text that nothing stands before: the begin token, else the end token, else id 0."""
    named = (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.eos_ids)
    return [next((token for token in named if token is not None), 0)]


@torch.inference_mode()
def log_likelihoods(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    tokens_per_batch: int = 4096,
    progress: Share = lambda done: None,
) -> list[Likelihood]:
    """One for each pair, in their order. What is longer than the model's context loses its beginning.

    Raises DataError for a continuation of no tokens, or of more than the model's context holds."""
    longest = model.config.max_position_embeddings
    windows = []
    for number, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= longest:
            raise DataError(
                f"continuation {number + 1} of {len(pairs)}: has {len(continuation)} tokens, and must have 1 to"
                f" {longest}, the model's context; check the task's choices and targets"
            )
        ids = (*context, *continuation)[-longest - 1 :]  # the last token is predicted, not read
        windows.append(Window(ids, len(continuation), number))
    found: dict[int, Likelihood] = {}
    for batch in batches(windows, tokens_per_batch):
        counts = [min(window.predicted_bytes, len(window.ids) - 1) for window in batch.windows]
        starts = [len(window.ids) - count for window, count in zip(batch.windows, counts, strict=True)]
        spans = list(zip(starts, counts, strict=True))
        nats_P, first_P = _score(model, batch.tokens, spans)
        for window, nats, first in zip(
            batch.windows, torch.split(nats_P, counts), torch.split(first_P, counts), strict=True
        ):
            found[window.document] = Likelihood(float(nats.double().sum()), bool(first.all()))
        progress(len(found) / len(pairs))
    return [found[number] for number in range(len(pairs))]


def _score(
    model: Transformer, tokens_BS: torch.Tensor, spans: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-ln p of each token of the spans (start, count), and whether the model would have chosen it."""
    x_BSD = model.model(tokens_BS[:, :-1].to(next(model.parameters()).device))
    x_PD = torch.cat([x_BSD[row, start - 1 : start - 1 + count] for row, (start, count) in enumerate(spans)])
    wanted_P = torch.cat([tokens_BS[row, start : start + count] for row, (start, count) in enumerate(spans)])
    nats, first = [], []
    rows = head_rows(model, x_PD)
    for x, wanted in zip(torch.split(x_PD, rows), torch.split(wanted_P, rows), strict=True):
        logits_PV = model.head(x).float().cpu()
        nats.append(torch.nn.functional.cross_entropy(logits_PV, wanted, reduction="none"))
        first.append(logits_PV.argmax(-1) == wanted)
    return torch.cat(nats), torch.cat(first)
