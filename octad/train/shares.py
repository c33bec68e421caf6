"""Tokens made by all processes of a run, each its share of the documents: the shard that one process makes, to the byte.

    shard = open_shard(world, files, tokenizer, cache=cache)         # every rank calls it; World() alone: one process

BATCH documents at a time are a rank's in turn. Each rank reads all of the text, which is quick, tokenises what is its
own and streams that into files beside the cache; the first one strings them together. Where not all ranks see the
cache, each machine makes a shard of its own.

Shapes: T tokens and N documents of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from octad.dist import World
from octad.staging import StagedDirectory, explained
from octad.text.corpus import Documents, open_documents
from octad.text.rows import Document
from octad.text.tokenizer import Tokenizer
from octad.train.shards import BATCH, Encoded, Shard, build, encoded, found_shard, intact, key_of

KINDS = {"tokens": np.uint32, "learn": np.bool_, "lengths": np.int64, "batches": np.int64}


def open_shard(
    world: World,
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    cache: Path,
    field: str = "text",
    append_eos: bool = True,
) -> Shard:
    """The tokens of some files, out of the cache or made anew; on every rank, which all have to call it. Raises DataError
    on all of them for unusable files."""
    opened = world.leader_first(lambda: [open_documents(file) for file in files])
    key = world.by_leader(lambda: key_of(opened, tokenizer, field, append_eos))
    directory, label = cache.expanduser() / key, ", ".join(str(f) for f in files)
    if world.size > 1 and not world.by_leader(lambda: intact(directory) is not None):
        _build_together(world, directory, opened, tokenizer, field, append_eos)

    def alone() -> Iterator[Encoded]:
        return encoded(_all(opened, field), tokenizer, append_eos)

    return world.leader_first(lambda: found_shard(directory, label, alone))


def _all(opened: Sequence[Documents], field: str) -> Iterator[Document]:
    return (document for documents in opened for document in documents.read(field, None))


def _build_together(
    world: World,
    directory: Path,
    opened: Sequence[Documents],
    tokenizer: Tokenizer,
    field: str,
    append_eos: bool,
) -> None:
    stage = StagedDirectory(directory.with_name(f"{directory.name}-parts"), own_place=True)
    try:
        place = Path(world.by_leader(lambda: str(stage.__enter__().path)))
        if not all(world.gather(place.is_dir())):
            return
        part = _Part(place, world.rank)
        world.together(lambda: part.write(_all(opened, field), world, tokenizer, append_eos))
        label = ", ".join(d.label for d in opened)
        parts = [_Part(place, rank) for rank in range(world.size)]
        world.by_leader(lambda: build(directory, _strung(parts), label))
    finally:
        if world.leads:
            stage.__exit__(None, None, None)


class _Part:
    """One rank's files."""

    def __init__(self, place: Path, rank: int) -> None:
        self.place, self.rank = place, rank

    def path(self, kind: str) -> Path:
        """Of raw values."""
        return self.place / f"{kind}.{self.rank}"

    def write(
        self, documents: Iterator[Document], world: World, tokenizer: Tokenizer, append_eos: bool
    ) -> None:
        """This rank's batches of the documents, tokenised."""
        with explained(self.place):
            files = {kind: self.path(kind).open("wb") for kind in KINDS}
            try:
                for number, batch in enumerate(iter(lambda: list(islice(documents, BATCH)), [])):
                    if number % world.size != world.rank:
                        continue
                    count = 0
                    for ids, learnt in encoded(iter(batch), tokenizer, append_eos):
                        files["tokens"].write(np.asarray(ids, np.uint32).tobytes())
                        files["learn"].write(learnt)
                        files["lengths"].write(np.int64(len(ids)).tobytes())
                        count += 1
                    files["batches"].write(np.int64(count).tobytes())
            finally:
                for file in files.values():
                    file.close()

    def read(self) -> Iterator[list[Encoded]]:
        """Batch by batch, the tokens of each document."""
        with explained(self.place):
            files = {kind: self.path(kind).open("rb") for kind in KINDS}
            try:
                while len(count := _take(files["batches"], np.int64, 1)):
                    lengths = _take(files["lengths"], np.int64, int(count[0])).tolist()
                    yield [
                        (_take(files["tokens"], np.uint32, length), files["learn"].read(length))
                        for length in lengths
                    ]
            finally:
                for file in files.values():
                    file.close()


def _take(file: Any, dtype: Any, count: int) -> Any:
    return np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype)


def _strung(parts: Sequence[_Part]) -> Iterator[Encoded]:
    """All documents in the order of the text."""
    readers = [part.read() for part in parts]
    number = 0
    while (batch := next(readers[number % len(readers)], None)) is not None:
        yield from batch
        number += 1
