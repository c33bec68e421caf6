"""Text on disk as windows of tokens: what routers are calibrated on and models are judged on.

    windows = read_windows(["french.jsonl.gz"], tokenizer, tokens=16384, window=512)

A file is .jsonl (objects with "text", or with "messages" that go through the chat template) or plain text, either of
them gzipped. Windows never cross a document. They are taken in turn from all documents (the first of each, then the
second of each, ...), so that a small budget still sees many documents.

Shapes: S positions of one window, B windows of a batch.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from octad.errors import DataError
from octad.text.tokenizer import Tokenizer

Document = str | list[Any]
SHORTEST_WINDOW = 16  # tokens; a shorter rest of a document is left out


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


def read_windows(
    files: Sequence[str | Path], tokenizer: Tokenizer, *, tokens: int, window: int
) -> list[Window]:
    """At most `tokens` tokens of the files, in windows of at most `window`. Raises DataError when there is none."""
    documents = [document for file in files for document in read_documents(file)]
    label = ", ".join(str(f) for f in files)
    return windows_of(documents, tokenizer, tokens=tokens, window=window, label=label)


def windows_of(
    documents: list[Document], tokenizer: Tokenizer, *, tokens: int, window: int, label: str
) -> list[Window]:
    """The same of documents that were read before; `label` says where from."""
    lengths = tokenizer.byte_lengths
    queues = [
        _cut(tokenizer, lengths, document, window, number, limit=tokens)
        for number, document in enumerate(_spread(documents, tokens // SHORTEST_WINDOW + 1))
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


def read_documents(file: str | Path) -> Iterator[Document]:
    """The documents of a file, in order: texts, or chats as lists of messages. Raises DataError with file and line."""
    path = Path(file)
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the files in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give .jsonl or plain text, either may be .gz")
    name = path.name.removesuffix(".gz")
    try:
        with _open(path) as stream:
            if not name.endswith((".jsonl", ".json")):
                yield stream.read()
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _document(line, f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); make it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def encode_document(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text (control tokens spelt in it are plain text) or of a chat (through the template)."""
    if isinstance(document, str):
        return tokenizer.encode(document, parse_special=False)
    return tokenizer.encode_chat(document, add_generation_prompt=False)


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _document(line: str, where: str) -> Document:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if "\\u" in line and not _encodable(value):
        raise DataError(f"{where}: holds half of a surrogate pair, which is no character; take it out")
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return list(value["messages"])
    keys = f"keys {', '.join(sorted(value))}" if isinstance(value, dict) else type(value).__name__
    raise DataError(f"{where}: expected an object with 'text' or 'messages', found {keys}")


def _encodable(value: Any) -> bool:
    """Whether UTF-8 has all its characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _spread(documents: list[Document], most: int) -> list[Document]:
    """At most `most` documents, evenly over the whole list."""
    if len(documents) <= most:
        return documents
    return [documents[i * len(documents) // most] for i in range(most)]


def _cut(
    tokenizer: Tokenizer, lengths: list[int], document: Document, window: int, number: int, limit: int
) -> Iterator[Window]:
    """The windows of one document; a rest shorter than SHORTEST_WINDOW is dropped."""
    if isinstance(document, str):
        document = document[: 64 * limit]
    ids = encode_document(document, tokenizer)
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) >= min(SHORTEST_WINDOW, window):
            yield _window(piece, number, lengths)


def _window(ids: Sequence[int], document: int, lengths: list[int]) -> Window:
    return Window(tuple(ids), sum(lengths[i] for i in ids[1:]), document)


def _shortened(window: Window, most: int, lengths: list[int]) -> Window:
    return window if len(window.ids) <= most else _window(window.ids[:most], window.document, lengths)
