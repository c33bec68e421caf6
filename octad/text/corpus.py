"""What a source's `files` stand for: files of documents, or data sets of the `datasets` library, on disk or from the hub.

    for document in open_documents("hf:wikimedia/wikipedia:20231101.fr").read("text"): ...

    hf:NAME[:SUBSET][:SPLIT]     datasets.load_dataset, from its cache where there is no network; split train unless said
    directory                    what Dataset.save_to_disk wrote; of a DatasetDict name the split's own directory
    file.arrow                   one Arrow file of such a directory
    anything else                see documents.py

Every one has a digest of what it holds, so that tokens made of it once are found again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octad.checkpoint.hf import fingerprint
from octad.errors import DataError
from octad.text.documents import Document, from_row, optional, read_documents

HUB = "hf:"
SPLITS = ("train", "validation", "valid", "test")


@dataclass(frozen=True)
class Documents:
    """`read(field)` gives them in order; `digest` is plain data that changes when they do."""

    label: str
    digest: Any
    read: Callable[[str], Iterator[Document]]


def open_documents(reference: str | Path) -> Documents:
    """What a reference stands for. Raises DataError where there is no such thing or it cannot be opened."""
    text = str(reference)
    if text.startswith(HUB):
        return _rows(text, lambda library: _from_hub(library, text))
    path = Path(text).expanduser()
    if path.is_dir():
        return _rows(text, lambda library: _from_disk(library, path))
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give .jsonl, .txt or .parquet, a data set's directory or hf:NAME"
        )
    if path.suffix == ".arrow":
        return _rows(text, lambda library: library.Dataset.from_file(text))
    return Documents(text, fingerprint(path), lambda field: read_documents(path, field))


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

    def read(field: str) -> Iterator[Document]:
        for number, row in enumerate(rows, 1):
            yield from_row(row, f"{label} row {number}", field)

    return Documents(label, str(rows._fingerprint), read)


def _from_hub(library: Any, reference: str) -> Any:
    name, subset, split = hub_parts(reference)
    return library.load_dataset(name, subset, split=split)


def _from_disk(library: Any, path: Path) -> Any:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(f"{path}: has the splits {', '.join(splits)}; name one: {path / splits[0]}")
    if not (path / "state.json").is_file():
        raise DataError(f"{path}: is a directory but no data set that save_to_disk wrote; name files in it")
    return library.load_from_disk(str(path))
