"""Text on disk as windows of tokens: what routers are calibrated on and models are judged on.

    windows = read_windows(["french.jsonl.gz"], tokenizer, tokens=16384, window=512)

What files can be is in corpus.py; chats go through the chat template. Windows never cross a document. They are taken in
turn from all documents (the first of each, then the second of each, ...), so that a small budget still sees many
documents; where it does not see all of them, some from everywhere. Of much text a part is read: MOST_CHARACTERS, or
CHARACTERS_PER_TOKEN for each token where that is more, shared evenly between the files, each from its beginning.

Shapes: S positions of one window, B windows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from octad.errors import DataError
from octad.text.corpus import open_all
from octad.text.rows import Document
from octad.text.tokenizer import Tokenizer

SHORTEST_WINDOW = 16  # tokens; a shorter rest of a document is left out
MOST_CHARACTERS, CHARACTERS_PER_TOKEN = 32 << 20, 256
CONVERSATION = 2  # windows that a conversation's are as long as, where text is taken from anywhere
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly however many there are
LONGEST_TOKEN = 64  # characters: what a window can need of a document


@dataclass(frozen=True)
class Window:
    """A run of tokens of one document: ids_S, and the UTF-8 bytes that positions 1..S-1 stand for."""

    ids: tuple[int, ...]
    predicted_bytes: int
    document: int


@dataclass(frozen=True)
class Batch:
    """Windows padded on the right: tokens_BS and mask_BS (True for real tokens)."""

    tokens: torch.Tensor
    mask: torch.Tensor
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Sizes:
    """How many tokens are taken at one place of a text, and of a conversation."""

    text: int
    conversation: int

    def of(self, document: Document) -> int:
        """Of this document."""
        return self.text if isinstance(document, str) else self.conversation


def read_windows(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    window: int,
    field: str = "text",
    anywhere: bool = False,
    conversation: int = 0,
) -> list[Window]:
    """At most `tokens` tokens of the files, in windows of at most `window`. Raises DataError when there is none.

    A document's windows are taken from its beginning on, or from `anywhere` in it: the first from its beginning in every
    other document, from further on in the rest, and those after it far from those before. Conversations are then taken
    from their beginnings, CONVERSATION windows at a time, or `conversation` tokens where these are more: an answer means
    little without its question."""
    return windows_of(
        read_some(files, field, tokens),
        tokenizer,
        tokens=tokens,
        window=window,
        label=", ".join(str(f) for f in files),
        anywhere=anywhere,
        conversation=conversation,
    )


def read_some(files: Sequence[str | Path], field: str, tokens: int) -> list[Document]:
    """Documents for this many tokens: all, or of each file its share of the most that is read. Raises DataError."""
    parts = open_all(files)
    share = max(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * tokens) // max(1, len(parts))
    found: list[Document] = []
    for part in parts:
        left = share
        for document in part.read(field, LONGEST_TOKEN * tokens):
            found.append(document)
            left -= size_of(document)
            if left <= 0:
                break
    return found


def size_of(document: Document) -> int:
    """Characters of a document, of a chat roughly."""
    return len(document) if isinstance(document, str) else sum(len(str(message)) for message in document)


def windows_of(
    documents: list[Document],
    tokenizer: Tokenizer,
    *,
    tokens: int,
    window: int,
    label: str,
    anywhere: bool = False,
    conversation: int = 0,
) -> list[Window]:
    """The same of documents that were read before; `label` says where from."""
    sizes = Sizes(window, max(CONVERSATION * window, conversation) if anywhere else window)
    lengths = tokenizer.byte_lengths
    queues = [
        _cut(tokenizer, lengths, document, sizes.of(document), number, limit=tokens, anywhere=anywhere)
        for number, document in enumerate(_spread(documents, tokens, sizes))
    ]
    chosen, total = [], 0
    while queues and total < tokens:
        waiting = []
        for queue in queues:
            if total >= tokens:
                break
            if piece := next(queue, None):
                chosen.append(_shortened(piece, tokens - total, lengths))
                total += len(chosen[-1].ids)
                waiting.append(queue)
        queues = waiting
    chosen = [w for w in chosen if len(w.ids) >= 2]
    if not chosen:
        raise DataError(f"{label}: no document has {SHORTEST_WINDOW} tokens or more; give more text")
    return chosen


def batches(windows: Sequence[Window], tokens_per_batch: int = 4096) -> Iterator[Batch]:
    """Windows of like length together, each batch of about `tokens_per_batch` tokens."""
    ordered = sorted(windows, key=lambda w: -len(w.ids))
    while ordered:
        size = max(1, tokens_per_batch // len(ordered[0].ids))
        yield pad(ordered[:size])
        ordered = ordered[size:]


def pad(windows: Sequence[Window]) -> Batch:
    """One batch; padding on the right is token 0, which causal attention never lets a real token see."""
    length = max(len(w.ids) for w in windows)
    tokens = torch.zeros(len(windows), length, dtype=torch.long)
    mask = torch.zeros(len(windows), length, dtype=torch.bool)
    for row, w in enumerate(windows):
        tokens[row, : len(w.ids)] = torch.tensor(w.ids)
        mask[row, : len(w.ids)] = True
    return Batch(tokens, mask, tuple(windows))


def encode_document(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text (control tokens spelt in it are plain text) or of a chat (through the template)."""
    if isinstance(document, str):
        return tokenizer.encode(document, parse_special=False)
    return tokenizer.encode_chat(document, add_generation_prompt=False)


def _spread(documents: list[Document], tokens: int, sizes: Sizes) -> list[Document]:
    """As many documents as the budget can look into, evenly over the whole list. Where it does not reach a window of
    each, in an order whose every beginning is even, too: files often go source by source."""
    most = tokens // SHORTEST_WINDOW + 1
    if len(documents) > most:
        documents = [documents[i * len(documents) // most] for i in range(most)]
    if sum(map(sizes.of, documents)) <= tokens:
        return documents
    return [documents[i] for i in scattered(len(documents))]


def scattered(count: int, start: float = 0.0) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly; it begins at the share `start` of them."""
    return sorted(range(count), key=lambda i: (i - int(start * count)) * GOLDEN % 1)


def _cut(
    tokenizer: Tokenizer,
    lengths: list[int],
    document: Document,
    window: int,
    number: int,
    limit: int,
    anywhere: bool,
) -> Iterator[Window]:
    """The windows of one document; a rest shorter than SHORTEST_WINDOW is dropped."""
    if isinstance(document, str):
        document = document[: LONGEST_TOKEN * limit]
    ids = encode_document(document, tokenizer)
    talk = not isinstance(document, str)
    starts = range(0, len(ids), window)
    first = 0.25 + 0.5 * (number * GOLDEN % 1) if number % 2 else 0.0
    order = scattered(len(starts), first) if anywhere and not talk else range(len(starts))
    for start in (starts[i] for i in order):
        piece = ids[start : start + window]
        if len(piece) >= min(SHORTEST_WINDOW, window):
            yield _window(piece, number, lengths)


def _window(ids: Sequence[int], document: int, lengths: list[int]) -> Window:
    return Window(tuple(ids), sum(lengths[i] for i in ids[1:]), document)


def _shortened(window: Window, most: int, lengths: list[int]) -> Window:
    return window if len(window.ids) <= most else _window(window.ids[:most], window.document, lengths)
