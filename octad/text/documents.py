"""The documents of one file, one after another, read as far as they are asked for.

    for document in read_documents(Path("french.jsonl.gz"), field="text"): ...

The suffix says what a file is, in capitals or not: .jsonl and .ndjson (an object a line), .json (the same, or one list of
objects), .csv and .tsv (the first line names the columns), .parquet; what a row holds is in rows.py. Anything else is one
plain text, with line ends as "\\n", but for kinds of files that are known to be none. All but Parquet may be compressed
(.gz, .zst). A byte-order mark is no text. Whatever is wrong is one line with the file and the place.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octad.errors import DataError
from octad.guard import parse_json
from octad.text.rows import Document, from_row

COMPRESSED = (".gz", ".zst")
LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
ROWS = (*LINES, ".json", *TABLES, ".parquet")
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst", ".tex")
NO_TEXT = (
    ".7z", ".arrow", ".bin", ".bz2", ".db", ".doc", ".docx", ".epub", ".gguf", ".h5", ".npy", ".npz", ".odt", ".pdf",
    ".pickle", ".pkl", ".ppt", ".pptx", ".pt", ".pth", ".rar", ".safetensors", ".sqlite", ".tar", ".tgz", ".xls",
    ".xlsx", ".xz", ".zip",
)  # fmt: skip
LINE_BYTES = 1 << 28  # of one line, or one row
PACKED = {  # how a compressed file begins, whatever it is called: what packed it, and the suffix that says so
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", ".zst"),
    b"BZh91AY": ("bzip2", ""),
    b"\xfd7zXZ\0": ("xz", ""),
    b"PK\x03\x04": ("zip", ""),
    b"PAR1\x15": ("Parquet", ".parquet"),
}
WIDE = {  # byte-order marks, the longer ones first, which begin like the others
    (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE): "UTF-32",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "UTF-16",
}
CHUNK = 1 << 16  # characters of a list of objects taken at a time
_BLANK = re.compile(r"[\s,]*")


def read_documents(path: Path, field: str = "text", most: int | None = None) -> Iterator[Document]:
    """The documents of one file, in order; of a plain text the first `most` characters suffice. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give .jsonl, .txt or .parquet")
    kind, packed = kind_of(path)
    if kind in NO_TEXT or (kind == ".parquet" and packed):
        raise DataError(f"{path}: {kind}{packed} is no text; give .jsonl, .csv, .parquet or .txt")
    if kind == ".parquet":
        yield from (from_row(row, where, field) for where, row in _parquet(path))
        return
    try:
        with _open(path, packed) as stream:
            _check_unpacked(stream, path)
            if kind not in ROWS:
                yield _text(stream, path, most)
                return
            rows = _table(stream, path, kind) if kind in TABLES else _objects(stream, path, kind)
            yield from (from_row(row, where, field) for where, row in rows)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged compressed file (gzip: {error}); make it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix that says what a file is, and that of its compression or "", in small letters."""
    name, packed = path.name.lower(), ""
    for suffix in COMPRESSED:
        if name.endswith(suffix):
            name, packed = name.removesuffix(suffix), suffix
    return Path(name).suffix, packed


def optional(module: str, purpose: str, extra: str = "train") -> Any:
    """A library of an extra, imported when it is needed. Raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{purpose} needs {module.split('.')[0]}: pip install 'octad[{extra}]'") from None


# ---- bytes -------------------------------------------------------------------------------------------------


def _open(path: Path, packed: str) -> io.BufferedIOBase:
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        zstandard = optional("zstandard", f"{path}: Zstandard")
        reader: io.BufferedIOBase = io.BufferedReader(_ZstdErrors(zstandard, path))
        return reader
    return path.open("rb")


def _check_unpacked(stream: Any, path: Path) -> None:
    """Raises DataError where what is read as text is packed, which its name does not say."""
    head = stream.peek(16)
    for magic, (tool, suffix) in PACKED.items():
        if head.startswith(magic):
            fix = f"give it a name that ends in {suffix}" if suffix else "unpack it first"
            raise DataError(f"{path}: is no text but packed ({tool}), which its name does not say; {fix}")


class _ZstdErrors(io.RawIOBase):
    """A decompressing stream whose own errors read as ours."""

    def __init__(self, zstandard: Any, path: Path) -> None:
        super().__init__()
        self._stream = zstandard.open(path, "rb")
        self._error, self._path = zstandard.ZstdError, path

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as there is. Raises DataError for a damaged file."""
        try:
            return int(self._stream.readinto(buffer))
        except self._error as error:
            raise DataError(f"{self._path}: damaged compressed file ({error}); make it again") from None

    def close(self) -> None:
        """The file too."""
        self._stream.close()
        super().close()


def _decoded(raw: bytes, where: str, *, whole: bool = True) -> str:
    """UTF-8 as text; where that is not the whole, its last character may be cut."""
    for marks, name in WIDE.items():
        if raw.startswith(marks):
            raise DataError(f"{where}: not UTF-8 text but {name}; convert it first")
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(raw, final=whole)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}); convert it first") from None


def _text(stream: io.BufferedIOBase, path: Path, most: int | None) -> str:
    limit = -1 if most is None else 4 * most + 3
    raw = stream.read(limit)
    text = _decoded(raw, str(path), whole=len(raw) != limit)
    if "\0" in text:
        raise DataError(
            f"{path}: holds NUL characters, so it is no text; give .jsonl, .csv, .parquet or .txt"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---- rows: each with where it stands -----------------------------------------------------------------------


def _objects(stream: Any, path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Those of JSON: a line each, or of one list, or one over several lines."""
    head = stream.peek(256).removeprefix(codecs.BOM_UTF8).lstrip() if kind == ".json" else b""
    if head.startswith(b"["):
        yield from _listed(stream, path)
    elif head.startswith(b"{") and head[1:].lstrip(b" \t\r").startswith(b"\n"):
        yield str(path), _parsed(_line(stream, str(path), whole=True), str(path))
    else:
        yield from _lines(stream, path)


def _lines(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, Any]]:
    number, line = 1, _line(stream, f"{path} line 1").removeprefix(codecs.BOM_UTF8)
    while line:
        if line.strip():
            yield f"{path} line {number}", _parsed_line(line, f"{path} line {number}")
        number += 1
        line = _line(stream, f"{path} line {number}")


def _line(stream: io.BufferedIOBase, where: str, *, whole: bool = False) -> bytes:
    line = stream.read(LINE_BYTES + 1) if whole else stream.readline(LINE_BYTES + 1)
    if len(line) > LINE_BYTES:
        raise DataError(f"{where}: is longer than {LINE_BYTES:,} bytes; give an object a line")
    return line


def _parsed(text: bytes | str, where: str) -> Any:
    text = _decoded(text.strip(), where) if isinstance(text, bytes) else text
    return parse_json(text, where, DataError, complaint="not JSON", prose=True)


def _parsed_line(line: bytes, where: str) -> Any:
    try:
        return _parsed(line, where)
    except DataError as error:
        if "(char " not in str(error):  # what is wrong has no place in the line: it is not the form
            raise
        raise DataError(f"{error}; give one object a line, or all of a list in a file .json") from None


def _listed(stream: io.BufferedIOBase, path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of one list, each as soon as enough of the file has been read."""
    decode, decoder = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder()
    text, number, size, opening = "", 0, CHUNK, "["
    while raw := stream.read(size):
        try:
            text += decode(raw)
        except UnicodeDecodeError:
            raise DataError(f"{path} object {number + 1}: not UTF-8 text; convert it first") from None
        text = text.lstrip().removeprefix(opening)
        at, opening = _BLANK.match(text).end(), ""  # type: ignore[union-attr]
        while at < len(text) and (end := _end_of_value(decoder, text, at)):
            number += 1
            yield f"{path} object {number}", _parsed(text[at:end], f"{path} object {number}")
            at = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        text, size = text[at:], max(CHUNK, 2 * (len(text) - at))
        if text.startswith("]"):
            return
        if len(text) > LINE_BYTES:
            break
    raise DataError(
        f"{path} object {number + 1}: not JSON, or cut short, or longer than {LINE_BYTES:,} bytes"
    )


def _end_of_value(decoder: json.JSONDecoder, text: str, at: int) -> int:
    """Where the value that begins there ends; 0 where more of the text is needed."""
    try:
        end = decoder.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return 0
    return end if end < len(text) else 0


def _table(stream: io.BufferedIOBase, path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Those of a table whose first line names the columns."""
    csv.field_size_limit(LINE_BYTES)
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")  # type: ignore[type-var]
    rows = csv.reader(lines, delimiter=TABLES[kind], strict=True)
    try:
        columns = next(rows, [])
        if len(set(columns)) != len(columns):
            raise DataError(f"{path} line 1: should name the columns, each once, found {columns!r:.200}")
        own = TABLES[kind]
        if len(columns) == 1 and (sign := next((s for s in ";\t," if s != own and s in columns[0]), "")):
            raise DataError(f"{path} line 1: its columns seem to be parted by {sign!r}; save it with {own!r}")
        for row in rows:
            where = f"{path} line {rows.line_num}"
            if row and len(row) != len(columns):
                raise DataError(
                    f"{where}: has {len(row)} columns, its first line {len(columns)}; mend or quote it"
                )
            if row:
                yield where, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num}: is no table of {kind[1:]} ({error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} line {rows.line_num + 1}: not UTF-8 text; convert it first") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Row by row, a batch in memory at a time."""
    parquet = optional("pyarrow.parquet", f"{path}: Parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: cannot be read as Parquet ({' '.join(str(error).split())})") from None
