"""Documents on disk, one after another: the raw material of training.

    for document in read_documents(Path("french.jsonl.gz"), field="text"): ...

A document is a text, or a chat as a list of messages. The suffix says what a file is: .jsonl or .json (one object a
line, its text under `field`, or a chat under "messages"), .parquet (the same as columns), anything else is one plain
text; all but Parquet may be compressed (.gz, .zst). Whatever is wrong is one line with the file and the line.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octad.errors import DataError

Document = str | list[Any]
COMPRESSED = (".gz", ".zst")


def read_documents(path: Path, field: str = "text") -> Iterator[Document]:
    """The documents of one file, in order. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give .jsonl, .txt or .parquet")
    if path.suffix == ".parquet":
        yield from _parquet(path, field)
        return
    try:
        with _open(path) as stream:
            if not path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
                yield _decoded(stream.read(), str(path))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _from_line(line, f"{path} line {number}", field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged compressed file ({error}); make it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def optional(module: str, purpose: str, extra: str = "train") -> Any:
    """A library of an extra, imported when it is needed. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{purpose} needs {module.split('.')[0]}: pip install 'octad[{extra}]'") from None


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        zstandard = optional("zstandard", f"{path}: Zstandard")
        reader: io.BufferedIOBase = io.BufferedReader(_ZstdErrors(zstandard, path))
        return reader
    return path.open("rb")


class _ZstdErrors(io.RawIOBase):
    """A decompressing stream whose own errors read as ours."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        super().__init__()
        self._stream = zstandard.open(path, "rb")
        self._error, self._path = zstandard.ZstdError, path

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase. Raises DataError for a damaged file."""
        try:
            return int(self._stream.readinto(buffer))
        except self._error as error:
            raise DataError(f"{self._path}: damaged compressed file ({error}); make it again") from None

    def close(self) -> None:
        """See io.RawIOBase."""
        self._stream.close()
        super().close()


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}); convert it first") from None


def _from_line(raw: bytes, where: str, field: str) -> Document:
    try:
        value = json.loads(_decoded(raw.strip(), where))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    return from_row(value, where, field)


def from_row(value: Any, where: str, field: str) -> Document:
    """The document that a row (an object of named columns) holds. Raises DataError naming the columns found."""
    if isinstance(value, dict) and isinstance(value.get(field), str):
        return str(value[field])
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return list(value["messages"])
    found = f"keys {', '.join(sorted(value))}" if isinstance(value, dict) else type(value).__name__
    raise DataError(f"{where}: expected an object with {field!r} or 'messages', found {found}; set field:")


def _parquet(path: Path, field: str) -> Iterator[Document]:
    """Row by row, a batch in memory at a time."""
    parquet = optional("pyarrow.parquet", f"{path}: Parquet")
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield from_row(row, f"{path} row {number}", field)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())})") from None
