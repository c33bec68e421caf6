"""How well a model predicts text: nats per window, bits per byte.

    nats = window_nats(model, windows)                  # one sum of -ln p(token) per window, its first token given
    bits_per_byte(nats, windows)

The logits of a long batch would not fit in memory (V is 50,000 and more), so the head runs over slices of positions.

Shapes: B windows, S positions, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from octad.checkpoint.text import Window, batches
from octad.model.transformer import Transformer

HEAD_SLICE = 512  # positions whose logits exist at one time


@torch.no_grad()  # not inference_mode, whose tensors sharded training could not use again
def window_nats(
    model: Transformer,
    windows: Sequence[Window],
    *,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] = lambda tokens: None,
    before: Callable[[torch.Tensor], None] = lambda mask_BS: None,
) -> list[float]:
    """For each window, the sum over its positions 1..S-1 of -ln p(token | the window before it), in float32.

    `before` gets each batch's mask_BS (False for padding) before the batch is run."""
    nats: dict[int, float] = {}
    numbers: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        numbers.setdefault(id(window), []).append(number)
    for batch in batches(windows, tokens_per_batch):
        before(batch.mask)
        losses_BS = _losses(model, batch.tokens, batch.mask)
        for row, window in enumerate(batch.windows):
            nats[numbers[id(window)].pop()] = float(losses_BS[row].double().sum())
        progress(int(batch.mask.sum()))
    return [nats[n] for n in range(len(windows))]


def _losses(model: Transformer, tokens_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
    """-ln p of each real token after the first, zero for the others: [B, S-1]."""
    x_ND = model.model(tokens_BS)[:, :-1].flatten(0, 1)
    targets = tokens_BS[:, 1:].flatten()
    pieces = [
        F.cross_entropy(model.head(x).float(), t, reduction="none")
        for x, t in zip(torch.split(x_ND, HEAD_SLICE), torch.split(targets, HEAD_SLICE), strict=True)
    ]
    return torch.cat(pieces).view(len(tokens_BS), -1) * mask_BS[:, 1:]


def bits_per_byte(nats: Sequence[float], windows: Sequence[Window]) -> float:
    """Bits that the model needs for one byte of the text, whatever its tokenizer."""
    return sum(nats) / math.log(2) / max(1, sum(w.predicted_bytes for w in windows))


def nats_per_token(nats: Sequence[float], windows: Sequence[Window]) -> float:
    """The usual cross-entropy; comparable between models of one tokenizer only."""
    return sum(nats) / max(1, sum(len(w.ids) - 1 for w in windows))
