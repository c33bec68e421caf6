"""What stands for text in a recipe, a configuration or on the command line: files, directories of them, data sets.

    for document in open_documents("hf:wikimedia/wikipedia:20231101.fr").read("text"): ...

    hf:NAME[:SUBSET][:SPLIT]     datasets.load_dataset, from its cache where there is no network; split train unless said
    directory                    what Dataset.save_to_disk wrote (of a DatasetDict name the split's own directory), or all
                                 files in it and below, which are all plain text or all rows; hidden ones do not count
    with * or ? or [             the files whose names match, in the order of their names; ** is any directories
    file.arrow                   one Arrow file of a data set
    any other file               see documents.py

Nothing is read before it is asked for. Every one has a digest of what it holds, so that tokens made of it once are found
again.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from octad.errors import DataError
from octad.fingerprint import fingerprint
from octad.guard import exists
from octad.text.documents import ROWS, TEXTS, kind_of, optional, read_documents
from octad.text.rows import Document, from_row

HUB = "hf:"
AHEAD = 64  # rows: as many as the library reads at a time, and more
SPLITS = ("train", "validation", "valid", "test")


@dataclass(frozen=True)
class TextFiles:
    """References and the column that holds their text, where it is not "text"."""

    files: Sequence[str | Path]
    field: str = "text"


@dataclass(frozen=True)
class Documents:
    """`read(field, most)` gives them in order, of a plain text as many characters as suffice (None: all); `digest()` is
    plain data that changes when they do."""

    label: str
    digest: Callable[[], Any]
    read: Callable[[str, int | None], Iterator[Document]]


def open_documents(reference: str | Path) -> Documents:
    """What a reference stands for. Raises DataError where there is no such thing or it cannot be opened."""
    parts = open_all([reference])
    if len(parts) == 1:
        return parts[0]

    def read(field: str, most: int | None = None) -> Iterator[Document]:
        return chain.from_iterable(part.read(field, most) for part in parts)

    return Documents(str(reference), lambda: [part.digest() for part in parts], read)


def open_all(references: Sequence[str | Path]) -> list[Documents]:
    """What all references stand for, file by file. Raises DataError."""
    return [part for reference in references for part in _parts(str(reference))]


def resolved(reference: str, directory: Path) -> str:
    """A reference as it is written in a file of this directory: paths are relative to it."""
    return reference if reference.startswith(HUB) else str(directory / Path(reference).expanduser())


def _parts(text: str) -> list[Documents]:
    if text.startswith(HUB):
        return [_rows(text, lambda library: _from_hub(library, text))]
    path = Path(text).expanduser()
    if not exists(path):
        return [_file(found) for found in _matching(path)]
    if not path.is_dir():
        return [_file(path)]
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return [_rows(text, lambda library: _from_disk(library, path))]
    return [_file(found) for found in _held(path)]


def _file(path: Path) -> Documents:
    if path.suffix.lower() == ".arrow":
        return _rows(str(path), lambda library: library.Dataset.from_file(str(path)))
    if not path.is_file():
        raise DataError(f"{path}: is no file; give .jsonl, .txt or .parquet")

    def read(field: str = "text", most: int | None = None) -> Iterator[Document]:
        return read_documents(path, field, most)

    return Documents(str(path), lambda: fingerprint(path), read)


def _matching(path: Path) -> list[Path]:
    """The files that a pattern stands for."""
    try:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    except (OSError, ValueError, re.error):
        found = []
    if not found:
        name = str(path) if len(str(path)) < 300 else f"{str(path)[:300]}..."
        name = name if name.isprintable() else repr(name)
        raise DataError(
            f"{name}: no such file; give .jsonl, .txt or .parquet, a data set's directory or hf:NAME"
        )
    return _one_kind(path, found)


def _held(directory: Path) -> list[Path]:
    """The files of text in a directory."""
    found = sorted(
        p
        for p in directory.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(directory).parts)
    )
    if not found:
        raise DataError(
            f"{directory}: is a directory but no data set that save_to_disk wrote, and there is no file in it"
        )
    return _one_kind(directory, found)


def _one_kind(reference: Path, files: list[Path]) -> list[Path]:
    """The files, which must all be rows or all plain text. Raises DataError naming one that is not."""
    kinds = {path: kind_of(path)[0] for path in files}
    rows = kinds[files[0]] in (*ROWS, ".arrow")
    for path, kind in kinds.items():
        known = kind in ROWS or kind in TEXTS or kind == ".arrow"
        if not known or (kind in (*ROWS, ".arrow")) != rows:
            reason = (
                f"is of another kind than {files[0].name}" if known else "is no file of text that is known"
            )
            raise DataError(
                f"{reference}: {path.name} in it {reason}; name the files, or a pattern such as *.jsonl"
            )
    return files


def hub_parts(reference: str) -> tuple[str, str | None, str]:
    """Name, subset and split of hf:NAME[:SUBSET][:SPLIT]; a single part is a split where it reads like one."""
    name, *rest = re.split(r":(?![^\[]*\])", reference.removeprefix(HUB))  # not within train[:10%]
    if not name or len(rest) > 2 or not all(rest):
        raise DataError(
            f"{reference}: expected hf:NAME, hf:NAME:SUBSET, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"
        )
    if len(rest) == 1 and rest[0].split("[")[0] in SPLITS:
        return name, None, rest[0]
    return name, rest[0] if rest else None, rest[1] if len(rest) > 1 else "train"


def _rows(label: str, load: Callable[[Any], Any]) -> Documents:
    library = optional("datasets", f"{label}: a data set")
    library.disable_progress_bars()
    try:
        rows = load(library)
    except Exception as error:  # the library's own errors and those of whatever it downloads with
        if isinstance(error, DataError):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        where = " from the hub or its cache" if label.startswith(HUB) else ""
        raise DataError(f"{label}: cannot be loaded{where} ({words[:300]})") from None

    def read(field: str = "text", most: int | None = None) -> Iterator[Document]:
        return (from_row(row, where, field) for where, row in _numbered(rows, label))

    return Documents(label, lambda: str(rows._fingerprint), read)


def _numbered(rows: Any, label: str) -> Iterator[tuple[str, Any]]:
    """The rows of a data set with their places. Raises DataError where one cannot be read.

    What Arrow maps into memory it believes: lengths that lie end in a crash, so that rows are looked through before."""
    number, waiting, checked = 1, iter(rows), _checked(rows)
    sound = (
        0 if rows._indices is None else -AHEAD - len(rows.data)
    )  # rows in an order of their own: all of them
    while True:
        where = f"{label} row {number}"
        try:
            while sound < number + AHEAD and (found := next(checked, 0)):
                sound += found
            row = next(waiting)
        except StopIteration:
            return
        except (
            Exception
        ) as error:  # the library's own errors, Arrow's, and those of whatever it downloads with
            words = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{where}: cannot be read ({words[:300]})") from None
        yield where, row
        number += 1


def _checked(rows: Any) -> Iterator[int]:
    """Checks a batch of a data set's rows after the other, and tells how many rows it has."""
    for batch in rows.data.to_batches():
        batch.validate(full=True)
        if batch.num_rows:
            yield batch.num_rows


def _from_hub(library: Any, reference: str) -> Any:
    name, subset, split = hub_parts(reference)
    return library.load_dataset(name, subset, split=split)


def _from_disk(library: Any, path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(f"{path}: has the splits {', '.join(splits)}; name one: {path / splits[0]}")
    return library.load_from_disk(str(path))
