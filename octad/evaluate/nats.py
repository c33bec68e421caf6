"""How well a model predicts text: nats a token, nats a window, bits per byte.

    nats = token_nats(model, windows)                   # one array a window: -ln p(token), its first token given
    bits_per_byte([n.sum() for n in nats], windows)

The logits of a long batch would not fit in memory (V is 50,000 and more), so the head runs over slices of positions, few
enough for what is in between to stay in the processor's cache. On the native kernels the head answers in float32:
logits near 20 in bfloat16 are a sixteenth apart.

Shapes: B windows, S positions, D model, V vocabulary, N positions of a slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from octad.fast.native_modules import NativeLinear
from octad.model.transformer import Transformer
from octad.text.windows import Batch, Window, batches

HEAD_BYTES = (
    16 << 20
)  # of logits that exist at one time: more would be memory that the system hands out anew each time
HEAD_BYTES_CUDA = 1 << 30
TOKENS_PER_BATCH = 4096

IDLE = Batch(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.bool), ())

Progress = Callable[[int], None]
Before = Callable[[Batch], None]


@torch.no_grad()  # not inference_mode, whose tensors sharded training could not use again
def token_nats(
    model: Transformer,
    windows: Sequence[Window],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress = lambda tokens: None,
    before: Before = lambda batch: None,
    rounds: int = 0,
) -> list[NDArray[np.float32]]:
    """For each window the -ln p(token | the window before it) of its positions 1..S-1, in float32.

    Windows of like length are run together. `before` gets each batch before it is run, `progress` its tokens after.
    `rounds`: of forward passes at the least, the last ones with nothing to read: ranks that share weights have to run
    equally many."""
    found: dict[int, NDArray[np.float32]] = {}
    numbers: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        numbers.setdefault(id(window), []).append(number)
    device = next(model.parameters()).device
    reading = list(batches(windows, tokens_per_batch))
    for _ in range(rounds - len(reading)):
        before(IDLE)
        _losses(model, IDLE.tokens.to(device))
    for batch in reading:
        before(batch)
        losses_BS: Any = _losses(model, batch.tokens.to(device)).cpu().numpy()
        for row, window in enumerate(batch.windows):
            found[numbers[id(window)].pop()] = losses_BS[row, : len(window.ids) - 1].copy()
        progress(int(batch.mask.sum()))
    return [found[n] for n in range(len(windows))]


def window_nats(model: Transformer, windows: Sequence[Window], **options: Any) -> list[float]:
    """The sum of each window's token_nats (with its options), taken in float64."""
    return [float(nats.sum(dtype=np.float64)) for nats in token_nats(model, windows, **options)]


def _losses(model: Transformer, tokens_BS: torch.Tensor) -> torch.Tensor:
    """-ln p of each token after the first: [B, S-1]; of padding it means nothing."""
    x_ND = model.model(tokens_BS)[:, :-1].flatten(0, 1)
    targets = tokens_BS[:, 1:].flatten()
    rows = head_rows(model, x_ND)
    slices = zip(torch.split(x_ND, rows), torch.split(targets, rows), strict=True)
    losses = [F.cross_entropy(logits(model, x), t, reduction="none") for x, t in slices]
    return torch.cat(losses).view(len(tokens_BS), -1)


def head_rows(model: Transformer, x_ND: torch.Tensor) -> int:
    """Positions whose logits may exist at one time."""
    return max(1, (HEAD_BYTES_CUDA if x_ND.is_cuda else HEAD_BYTES) // (4 * model.config.vocab_size))


def logits(model: Transformer, x_ND: torch.Tensor) -> torch.Tensor:
    """The head's logits [N, V] in float32."""
    if isinstance(model.lm_head, NativeLinear):
        return model.head(x_ND.float())
    return model.head(x_ND).float()


def bits_per_byte(nats: Sequence[float], windows: Sequence[Window]) -> float:
    """Bits that the model needs for one byte of the text, whatever its tokenizer."""
    return sum(nats) / math.log(2) / max(1, sum(w.predicted_bytes for w in windows))


def nats_per_token(nats: Sequence[float], windows: Sequence[Window]) -> float:
    """The usual cross-entropy; comparable between models of one tokenizer only."""
    return sum(nats) / max(1, sum(len(w.ids) - 1 for w in windows))
