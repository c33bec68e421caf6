"""Text as token ids in memory-mapped files: tokenised once, read at any place for nothing.

    shard = open_shard(world, ["french.jsonl.gz"], tokenizer, cache=token_cache(None))    # shares.py: who makes it
    shard.tokens[shard.starts[3] : shard.starts[4]]            # the fourth document, end-of-text included

A shard is a directory named by a digest of everything that decides its contents: the files' bytes, the tokenizer, the
field. It appears whole or not at all, so that an interrupted run or a second one beside it does no harm; it is read whole
once when it is opened, against the digests that it was written with, and made again where they differ: damaged ids are
never trained on. In a chat only what the assistant says (and the token that ends it) is learnt; elsewhere everything is.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from octad.errors import DataError, OutputError
from octad.fingerprint import digest_of
from octad.kernels.compile import cache_directory
from octad.staging import StagedDirectory, explained
from octad.text.corpus import Documents
from octad.text.rows import Document
from octad.text.tokenizer import Tokenizer

FORMAT, DIGESTS = 2, "digests.json"
Encoded = tuple[Any, bytes]  # ids of a document, and a byte for each, 1 where it is learnt
BATCH = 256  # documents tokenised at a time, in the library's threads


@dataclass(frozen=True)
class Shard:
    """tokens_T (uint32), learn_T (bool; None: all are learnt) and starts [N + 1], all memory-mapped."""

    label: str
    tokens: npt.NDArray[np.uint32]
    learn: npt.NDArray[np.bool_] | None
    starts: npt.NDArray[np.int64]


def token_cache(chosen: str | None) -> Path:
    """Where the tokens lie: where data.cache says, else ~/.cache/octad/tokens or OCTAD_CACHE's own."""
    return cache_directory() / "tokens" if chosen is None else Path(chosen)


def found_shard(directory: Path, label: str, made: Callable[[], Iterator[Encoded]]) -> Shard:
    """The shard in this directory, made there where there is none. Raises OutputError where it cannot be read back."""
    if (found := intact(directory)) is None:
        build(directory, made(), label)
        if (found := intact(directory)) is None:
            raise OutputError(f"{directory}: is not read as it was written; give another data.cache")
    return Shard(label, found["tokens"], found.get("learn"), found["starts"])


def intact(directory: Path) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays of a shard; None where there is none, or one that is damaged, which is removed."""
    try:
        digests = dict(json.loads((directory / DIGESTS).read_text()))
        if {"tokens", "starts"} <= digests.keys() and digests == {n: _digest(directory, n) for n in digests}:
            return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in digests}
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    return None


def _digest(directory: Path, name: str) -> str:
    with (directory / f"{name}.npy").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """What decides the ids of a text or chat, as 16 hexadecimal digits."""
    text = tokenizer.core.to_str() + str(tokenizer.chat_template) + str(tokenizer.eos_ids)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key_of(opened: Sequence[Documents], tokenizer: Tokenizer, field: str, append_eos: bool) -> str:
    """The name of a shard: a digest of everything that decides its contents."""
    facts = [documents.digest() for documents in opened]
    parts: list[Any] = [FORMAT, facts, tokenizer_digest(tokenizer), field, append_eos]
    return digest_of(parts)[:32]


def build(directory: Path, documents: Iterator[Encoded], label: str) -> None:
    """Write a shard of some documents, whole or not at all. Raises DataError where there is nothing in them."""
    try:
        with StagedDirectory(directory, own_place=True) as stage, explained(directory):
            with (
                _Growing(stage.path / "tokens.npy", np.uint32) as tokens,
                _Growing(stage.path / "learn.npy", np.bool_) as learn,
                _Growing(stage.path / "starts.npy", np.int64) as starts,
            ):
                starts.add([0])
                all_learnt = True
                for ids, learnt in documents:
                    tokens.add(ids)
                    learn.add(np.frombuffer(learnt, np.bool_))
                    starts.add([tokens.count])
                    all_learnt = all_learnt and all(learnt)
            if not tokens.count:
                raise DataError(f"{label}: no text in it; give more")
            names = ["tokens", "starts"] if all_learnt else ["tokens", "starts", "learn"]
            if all_learnt:
                (stage.path / "learn.npy").unlink()
            digests = {name: _digest(stage.path, name) for name in names}
            (stage.path / DIGESTS).write_text(json.dumps(digests))
            stage.commit()
    except OutputError:
        if not (directory / DIGESTS).is_file():  # else somebody else made it in the meantime
            raise


class _Growing:
    """An .npy file of one dimension that is written as it comes: memory does not grow with the text. Its header has room
    for any length, and is written again at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0

    def __enter__(self) -> Self:
        self.file = self.path.open("w+b")
        self.start = self._header()
        return self

    def __exit__(self, *error: object) -> None:
        with self.file:
            if error[0] is None and self._header() != self.start:
                raise AssertionError("the header of an .npy file has grown")

    def add(self, values: Any) -> None:
        """Append them."""
        array = np.asarray(values, self.dtype)
        self.file.write(array.tobytes())
        self.count += len(array)

    def _header(self) -> int:
        """Write the header and say where it ends."""
        self.file.seek(0)
        about = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        npy.write_array_header_1_0(self.file, about)
        return self.file.tell()


def encoded(documents: Iterator[Document], tokenizer: Tokenizer, append_eos: bool) -> Iterator[Encoded]:
    """Ids of each document, and for each id 1 where it is learnt. Texts are tokenised many at a time."""
    end = list(tokenizer.eos_ids[:1]) if append_eos else []
    texts: list[str] = []
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
            if len(texts) < BATCH:
                continue
        yield from _encode_texts(texts, tokenizer, end)
        texts = []
        if not isinstance(document, str):
            yield encode_answers(document, tokenizer)
    yield from _encode_texts(texts, tokenizer, end)


def _encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, end: list[int]
) -> Iterator[tuple[list[int], bytes]]:
    for ids in tokenizer.encode_batch(texts, parse_special=False):
        if ids:
            yield ids + end, b"\1" * (len(ids) + len(end))


def encode_answers(messages: list[Any], tokenizer: Tokenizer) -> tuple[list[int], bytes]:
    """A chat's ids through the template, and 1 for those of the assistant's answers, up to the token that ends them.

    Raises DataError where the template writes earlier messages in another way once there are later ones."""
    ids: list[int] = []
    learn = bytearray()
    for count in range(1, len(messages) + 1):
        role = messages[count - 1].get("role") if isinstance(messages[count - 1], dict) else None
        if role == "assistant":
            asked = tokenizer.encode_chat(messages[: count - 1], add_generation_prompt=True)
            learn.extend(bytes(len(asked) - len(ids)))
            ids = _continued(ids, asked, tokenizer)
        whole = tokenizer.encode_chat(messages[:count], add_generation_prompt=False)
        new = whole[len(ids) :]
        ends = [n for n, token in enumerate(new, 1) if token in tokenizer.eos_ids]
        learnt = 0 if role != "assistant" else ends[-1] if ends else len(new)
        learn.extend(bytes([1]) * learnt + bytes(len(new) - learnt))
        ids = _continued(ids, whole, tokenizer)
    return ids, bytes(learn)


def _continued(ids: list[int], longer: list[int], tokenizer: Tokenizer) -> list[int]:
    if longer[: len(ids)] != ids:
        raise DataError(
            f"{tokenizer.label}: its chat template rewrites earlier messages, so answers cannot be told apart; "
            "give one answer a chat, or plain text"
        )
    return longer
