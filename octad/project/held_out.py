"""Text of one's own, split into what is learnt from and what is judged on, by document.

    choice = choose(["texts/law"], "text", 0.1)             # looks at all of it, writes nothing
    split = divide(["texts/law"], "text", choice, train=Path("train.jsonl"), held_out=Path("heldout.jsonl"))
    split.documents, split.characters, split.held_out

A document goes whole to one side, chosen by a digest of what it holds: equal documents go to the same side, and the same
text is split the same way again. Where there are too few documents to choose from, they are cut at blank lines (long
paragraphs at the ends of lines and sentences) into passages first. Held-out text ends at MOST characters: more says
nothing new.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from octad.errors import DataError
from octad.staging import staged_file
from octad.text.corpus import open_all
from octad.text.rows import Document

FEWEST = 10  # documents to choose from
FEWEST_HELD_OUT = 5  # what intervals are made of
MOST = 200_000  # characters of held-out text
PASSAGE = 2_000  # characters of a passage, about
_BLANK_LINES, _SENTENCE_ENDS = re.compile(r"\n\s*\n"), re.compile(r"(?<=[.!?]) (?=\S)")


@dataclass(frozen=True)
class Split:
    """What one expert's text came to: documents and characters of each side; whether documents were cut; a sample."""

    documents: int
    characters: int
    held_out: int
    held_out_characters: int
    cut: bool
    sample: str


def first_document(references: Sequence[str], field: str) -> Document:
    """The first document of each file is read, so that a mistake is seen before any work. Raises DataError."""
    found = None
    for part in open_all(references):
        document = next(part.read(field, 1000), None)
        found = document if found is None else found
    if found is None:
        raise DataError(f"{', '.join(references)}: no text in it; give more")
    return found


@dataclass(frozen=True)
class Choice:
    """The digests of what is held out; whether documents are cut into passages."""

    held_out: frozenset[bytes]
    cut: bool


def choose(references: Sequence[str], field: str, share: float) -> Choice:
    """What to hold out. Raises DataError where there is too little text."""
    sizes = {_digest(d): _size(d) for d in _pieces(references, field, cut=False)}
    if cut := len(sizes) < FEWEST:
        sizes = {_digest(d): _size(d) for d in _pieces(references, field, cut=True)}
    if len(sizes) < FEWEST:
        raise DataError(
            f"{', '.join(references)}: has {len(sizes)} different documents or passages; at least {FEWEST} are needed"
            " to hold some out: give more text"
        )
    return Choice(frozenset(_choose(sizes, share)), cut)


def divide(references: Sequence[str], field: str, choice: Choice, *, train: Path, held_out: Path) -> Split:
    """Write both sides as .jsonl. Raises DataError, OutputError."""
    counts, characters, sample = [0, 0], [0, 0], ""
    with (
        staged_file(train) as learnt,
        staged_file(held_out) as judged,
        learnt.open("w", encoding="utf-8") as left,
        judged.open("w", encoding="utf-8") as right,
    ):
        for document in _pieces(references, field, cut=choice.cut):
            side = int(_digest(document) in choice.held_out)
            _write((left, right)[side], document)
            counts[side] += 1
            characters[side] += _size(document)
            if not side and isinstance(document, str) and len(sample) < PASSAGE * 10:
                sample += document
    return Split(counts[0], characters[0], counts[1], characters[1], choice.cut, sample)


def _choose(sizes: dict[bytes, int], share: float) -> set[bytes]:
    """Which documents are held out: in the order of their digests, until there is enough of them. One that is longer
    than all that is wanted comes last, the shortest of such first: it would take much of the text with it."""
    wanted, total, chosen = min(MOST, share * sum(sizes.values())), 0, set[bytes]()
    for digest in sorted(sizes, key=lambda digest: (max(sizes[digest], wanted), digest)):
        if total >= wanted and len(chosen) >= FEWEST_HELD_OUT:
            break
        if len(chosen) >= len(sizes) // 2:
            break
        chosen.add(digest)
        total += sizes[digest]
    return chosen


def _pieces(references: Sequence[str], field: str, *, cut: bool) -> Iterator[Document]:
    """The documents, or passages of them; nothing that is empty."""
    for document in (d for part in open_all(references) for d in part.read(field, None)):
        parts = _passages(document) if cut and isinstance(document, str) else [document]
        yield from (part for part in parts if not isinstance(part, str) or part.strip())


def _passages(text: str) -> Iterator[str]:
    """Paragraphs of a text, put together until they are of about PASSAGE characters."""
    passage = ""
    for between, paragraph in _paragraphs(text):
        passage = f"{passage}{between}{paragraph}" if passage else paragraph
        if len(passage) >= PASSAGE:
            yield passage
            passage = ""
    if passage:
        yield passage


def _paragraphs(text: str) -> Iterator[tuple[str, str]]:
    """What stood before it, and each paragraph; of one longer than a passage its lines, of long lines their sentences."""
    for paragraph in _BLANK_LINES.split(text):
        between = "\n\n"
        for line in paragraph.split("\n") if len(paragraph) > PASSAGE else [paragraph]:
            for sentence in _SENTENCE_ENDS.split(line) if len(line) > PASSAGE else [line]:
                yield between, sentence
                between = " "
            between = "\n"


def _size(document: Document) -> int:
    return len(document) if isinstance(document, str) else len(json.dumps(document, ensure_ascii=False))


def _digest(document: Document) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _write(file: TextIO, document: Document) -> None:
    row = {"text": document} if isinstance(document, str) else {"messages": document}
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
