"""What the tokens of a base or member are, in whatever form its vocabulary lies beside its weights.

    found = read_tokens(member)          # None: it has no vocabulary of its own
    found.texts[257], found.tokenizer.chat_template

Forms: tokenizer.json, the metadata of a GGUF file, a bare SentencePiece model (tokenizer.model), and the older pair of
vocab.json and added_tokens.json. Of the last two the texts are read, to compare them; a tokenizer is not made of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from octad.checkpoint.gguf.reader import GGUFSource
from octad.checkpoint.gguf.vocabulary import GGUFVocabulary
from octad.checkpoint.load import load_tokenizer
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import View
from octad.errors import CheckpointError
from octad.guard import read_object
from octad.text.tokenizer import Tokenizer

UNUSED = re.compile(r"\[PAD\d+\]")  # what llama.cpp's converter calls rows without a token


@dataclass(frozen=True)
class Tokens:
    """Id to text, and the tokenizer where one can be made of it. `key` is equal where the files are."""

    texts: Mapping[int, str]
    tokenizer: Tokenizer | None
    key: bytes


def read_tokens(source: TensorSource, seen: Mapping[bytes, Tokens] | None = None) -> Tokens | None:
    """The tokens of a source; None where it has none of its own (an adapter then has its base's).

    What is in `seen` already, by key, is not parsed again. Raises CheckpointError for damaged files."""
    while isinstance(source, View):
        source = source.source
    if isinstance(source, GGUFSource):
        return _of_gguf(source)
    directory = source.path if isinstance(source, AdapterSource) else source.directory
    if directory is None:
        return None
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenizer.model")
    beside = ("vocab.json", "added_tokens.json", "chat_template.jinja", "tekken.json")
    key = _digest([directory / name for name in (*names, *beside)])
    if seen and key in seen:
        return seen[key]
    if (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_directory(directory)
        return Tokens(texts_of(tokenizer), tokenizer, key)
    return _of_older_files(directory, key)


def texts_of(tokenizer: Tokenizer) -> dict[int, str]:
    """Id to text of everything that a tokenizer knows."""
    return _used(tokenizer.texts)


def _used(texts: Mapping[int, str]) -> dict[int, str]:
    return {i: text for i, text in texts.items() if not UNUSED.fullmatch(text)}


def _of_gguf(source: GGUFSource) -> Tokens:
    """A tokenizer that cannot be rebuilt (an unknown way to cut text) is still a vocabulary to compare."""
    texts = _used(dict(enumerate(GGUFVocabulary.of(source.header).tokens)))
    try:
        tokenizer = load_tokenizer(source)
    except CheckpointError:
        tokenizer = None
    return Tokens(texts, tokenizer, repr(sorted(texts.items())).encode())


def _of_older_files(directory: Path, key: bytes) -> Tokens | None:
    model, table = directory / "tokenizer.model", directory / "vocab.json"
    if model.is_file():
        texts = dict(enumerate(sentencepiece_texts(model)))
    elif table.is_file():
        texts = _by_id(table)
    elif (directory / "tekken.json").is_file():
        raise CheckpointError(
            f"{directory}: its vocabulary (tekken.json) cannot be compared with the base's; save it with transformers'"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    else:
        return None
    added = directory / "added_tokens.json"
    return Tokens(texts | (_by_id(added) if added.is_file() else {}), None, key)


def _by_id(path: Path) -> dict[int, str]:
    table = read_object(path)
    if not all(type(i) is int for i in table.values()):
        raise CheckpointError(f"{path}: should map each token to its id")
    return {i: text for text, i in table.items()}


def _digest(paths: list[Path]) -> bytes:
    found = hashlib.sha256()
    for path in paths:
        data = path.read_bytes() if path.is_file() else b""
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


# ---- SentencePiece ------------------------------------------------------------------------------------------


def sentencepiece_texts(path: Path) -> list[str]:
    """The pieces of a SentencePiece model in the order of their ids. Raises CheckpointError for another kind of file.

    Format: sentencepiece_model.proto: field 1 of the model repeats pieces, whose field 1 is the text."""
    try:
        pieces = [piece for number, piece in _fields(path.read_bytes()) if number == 1]
        texts = [next(text for number, text in _fields(piece) if number == 1).decode() for piece in pieces]
    except (IndexError, StopIteration, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no SentencePiece model, so that its tokens cannot be compared with the base's; save the"
            " tokenizer with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        ) from error
    if not texts:
        raise CheckpointError(f"{path}: holds no tokens; copy it again")
    return texts


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protocol buffer message that have a length; others are passed over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("cut short")
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")
