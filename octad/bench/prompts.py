"""Real text for benchmarks: which experts a token goes to depends on what it says, and so does the speed.

    texts = packaged_texts(tokenizer)          # held-out text of eight domains that comes with octad
    texts = file_texts(path, tokenizer)        # or the user's own
    texts.prompts(users=4, length=128, turn=0)

Neighbours in a batch come from different domains, and each repeat starts at the next domain, so that a median is one
over domains. All contestants of a repeat get the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from octad.errors import DataError
from octad.text.documents import read_documents
from octad.text.rows import Document
from octad.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Texts:
    """Ids of running text, by domain."""

    ids: Mapping[str, Sequence[int]]
    origin: str

    def prompts(self, users: int, length: int, turn: int) -> list[list[int]]:
        """One prompt a user. Number k (turn, turn + 1, ...) is the next unused stretch of domain k modulo their count;
        a text that is too short begins again."""
        names = list(self.ids)
        return [
            self._stretch(names[k % len(names)], k // len(names), length) for k in range(turn, turn + users)
        ]

    def _stretch(self, name: str, number: int, length: int) -> list[int]:
        ids = self.ids[name]
        return [ids[(number * length + i) % len(ids)] for i in range(length)]

    def repeats(self, users: int, length: int, turns: int) -> list[str]:
        """Domains too short for so many prompts: their text is used more than once."""
        stretches = -(-(users + turns - 1) // len(self.ids))
        return [name for name, ids in self.ids.items() if len(ids) < stretches * length]


def packaged_texts(tokenizer: Tokenizer) -> Texts:
    """octad/demo/data: general, python, c, french, german, spanish, maths, literature."""
    with as_file(files("octad") / "demo" / "data") as folder:
        found = {file.parent.name: _ids([file], tokenizer) for file in sorted(folder.glob("*/heldout.jsonl"))}
    if not found:
        raise DataError("octad/demo/data: holds no text; install octad again, or give --text FILE")
    return Texts(found, f"held-out text of {len(found)} domains that comes with octad: {', '.join(found)}")


def file_texts(file: Path, tokenizer: Tokenizer) -> Texts:
    """A .jsonl or plain text file, gzipped or not, as one domain. Raises DataError."""
    ids = _ids([file], tokenizer)
    if len(ids) < 2:
        raise DataError(f"{file}: holds no text to read; give a longer one")
    return Texts({file.name: ids}, f"the text of {file.name}")


def _ids(paths: Sequence[Path], tokenizer: Tokenizer) -> list[int]:
    texts = [_plain(document) for path in paths for document in read_documents(path)]
    return [token for ids in tokenizer.encode_batch(texts, parse_special=False) for token in ids]


def _plain(document: Document) -> str:
    """A text as it is; of a chat what was said, since not every model has a template."""
    if isinstance(document, str):
        return document
    return "\n".join(str(message.get("content", "")) for message in document)
