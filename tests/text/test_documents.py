"""One reader for every command: each kind of file gives the documents that were put into it, or one line."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet
from small import character_tokenizer, texts

from octad.combine.calibration import check_files
from octad.combine.recipe import Recipe
from octad.dist import World
from octad.errors import DataError
from octad.evaluate.domains import read_domains
from octad.text.corpus import TextFiles, open_all, open_documents
from octad.text.documents import read_documents
from octad.text.windows import read_windows
from octad.train.shares import open_shard

ROWS = ["plain", 'with "quotes", commas\tand tabs', "two\nlines", "", "\u00e9t\u00e9 \U0001f600"]
TOKENIZER = character_tokenizer()
BOM = b"\xef\xbb\xbf"


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["id", "text"], *([str(n), row] for n, row in enumerate(ROWS))])
    return text.getvalue().encode()


def saved_as_parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"text": ROWS}), sink)
    return sink.getvalue()


OBJECTS = [{"text": row} for row in ROWS]
KINDS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: lines(OBJECTS),
    "a.ndjson": lambda: lines(OBJECTS),
    "a.JSONL": lambda: lines(OBJECTS),
    "a.json": lambda: lines(OBJECTS),
    "list.json": lambda: json.dumps(OBJECTS).encode(),
    "indented.json": lambda: json.dumps(OBJECTS, indent=2).encode(),
    "a.csv": lambda: table(","),
    "a.TSV": lambda: table("\t"),
    "a.parquet": saved_as_parquet,
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_documents(tmp_path: Path, name: str, mark: bytes, packed: str) -> None:
    data = KINDS[name]()
    if name == "a.parquet" and (mark or packed):
        return
    pack = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".zst": zstandard.compress}[packed]
    (tmp_path / (name + packed)).write_bytes(pack(mark + data))
    assert list(read_documents(tmp_path / (name + packed))) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a", "a.TXT"])
def test_anything_else_is_one_plain_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BOM + b'"a",b\r\nc\rd\n')
    assert list(read_documents(tmp_path / name)) == ['"a",b\nc\nd\n']


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, CHAT),
        ({"conversations": CHAT}, CHAT),
        ({"instruction": "a", "input": "", "output": "b"}, CHAT),
        (
            {"system": "s", "instruction": "a", "input": "c", "output": "b"},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "a\n\nc"}, CHAT[1]],
        ),
    ],
)
def test_ways_to_write_a_chat(tmp_path: Path, row: dict[str, Any], document: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([row]))
    assert list(read_documents(tmp_path / "a.jsonl")) == [document]


def test_a_field_of_chats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"dialogue": CHAT}]))
    assert list(read_documents(tmp_path / "a.jsonl", "dialogue")) == [CHAT]


WRONG: list[tuple[str, bytes, str]] = [
    (
        "a.jsonl",
        lines([{"text": "x", "messages": CHAT}]),
        "line 1: holds a text as 'text' and a chat as 'messages'",
    ),
    ("a.csv", b"text\nx,y\n", "line 2: has 2 columns, its first line 1"),
    ("a.csv", b"Il pleut.\nLe chat dort.\n", "line 2: expected an object with 'text'.*found keys Il pleut"),
    ("a.csv", b"text;page\nx;y\n", "line 1: its columns seem to be parted by ';'; save it with ','"),
    ("a.tsv", b"text,page\nx,y\n", "line 1: its columns seem to be parted by ','"),
    ("a.jsonl", b'{"text": null}', "line 1: 'text' should be a text, found null"),
    ("a.jsonl", b'{"text": {"de": "x"}}', "line 1: 'text' should be a text, found an object"),
    ("a.csv", b'text\n"x', r"line \d: is no table of csv"),
    ("a.csv", b"text,text\nx,y\n", "line 1: should name the columns, each once"),
    ("a.csv", b"text\n\xff\n", "not UTF-8"),
    ("a.json", b'{"data": [1,\n 2]}', "not JSON|expected an object"),
    ("a.json", b'{\n"data": [1]\n}', "expected an object with 'text'"),
    ("a.json", b'[{"text": "x"}, {"te', "a.json object 2: not JSON"),
    ("a.json", b'[{"text": "x"}, 5]', "a.json object 2: expected an object with 'text'"),
    ("a.json", b'[{"text": "\xff"}]', "a.json object 1: not UTF-8"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
    ("a.jsonl", b'{"text": 1' + b"0" * 5000 + b"}\n", "line 1: not JSON: a number of 5001 digits"),
    ("a.jsonl", b'{"conversations": [{"from": "nobody", "value": "x"}]}', "is from 'nobody'"),
    ("a.jsonl", b'{"conversations": [{"from": "human"}]}', "conversations 1: has no text as 'value'"),
    ("a.txt", "utf-16".encode("utf-16"), "not UTF-8 text but UTF-16"),
    ("a.txt", b"a\0b", "holds NUL characters"),
    ("a.pdf", b"%PDF", ".pdf is no text"),
    ("a.tar.gz", gzip.compress(b"x", mtime=0), ".tar.gz is no text"),
    ("a.parquet.gz", gzip.compress(b"x", mtime=0), "is no text"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_what_a_file_is_not(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


# ---- several files -------------------------------------------------------------------------------------------


def folder(directory: Path) -> Path:
    (directory / "d" / "deep").mkdir(parents=True)
    (directory / "d" / "b.jsonl").write_bytes(lines([{"text": "two"}]))
    (directory / "d" / "a.csv").write_text("text\none\n")
    (directory / "d" / "deep" / "c.parquet").write_bytes(saved_as_parquet())
    (directory / "d" / ".hidden.txt").write_text("no")
    return directory / "d"


def test_directories_and_patterns(tmp_path: Path) -> None:
    place = folder(tmp_path)
    for reference, expected in (
        (place, ["one", "two", *ROWS]),
        (place / "*.*", ["one", "two"]),
        (place / "**" / "*.parquet", ROWS),
        (place / "[ab].*", ["one", "two"]),
    ):
        assert list(open_documents(reference).read("text", None)) == expected
        assert [str(d) for p in open_all([reference]) for d in p.read("text", None)] == expected


def test_a_directory_of_several_kinds_is_refused(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place / "README.md").write_text("# Data")
    with pytest.raises(DataError, match=r"README\.md in it is of another kind than b\.jsonl|than README\.md"):
        open_documents(place)
    (place / "README.md").rename(place / "LICENCE")
    with pytest.raises(DataError, match="LICENCE in it is no file of text that is known"):
        open_documents(place)


@pytest.mark.parametrize("name", ["none*", "x" * 5000, "a\0b", "[", "none.jsonl"])
def test_names_of_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        open_documents(tmp_path / name)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_tokens_are_made_anew_when_a_file_joins(tmp_path: Path) -> None:
    place = folder(tmp_path)
    first = open_shard(World(), [place], TOKENIZER, cache=tmp_path / "cache")
    (place / "z.jsonl").write_bytes(lines([{"text": "more"}]))
    assert (
        len(open_shard(World(), [place], TOKENIZER, cache=tmp_path / "cache").starts) == len(first.starts) + 1
    )


# ---- reading no more than is needed --------------------------------------------------------------------------


class Counted(io.RawIOBase):
    """Endless lines, and how many bytes of them were asked for."""

    def __init__(self, line: bytes) -> None:
        super().__init__()
        self.line, self.given = line, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        start = self.given % len(self.line)
        data = (self.line * (len(buffer) // len(self.line) + 2))[start : start + len(buffer)]
        buffer[:] = data
        self.given += len(data)
        return len(data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
def test_a_file_without_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = texts(1)[0]
    line = {
        "a.jsonl": lines([{"text": text}]),
        "a.txt": text.encode() + b"\n",
        "a.csv": text.encode() + b"\n",
        "a.json": json.dumps({"text": text}).encode() + b",",
    }[name]
    stream = Counted(line)
    buffered = io.BufferedReader(stream)
    if first := {"a.json": b"[", "a.csv": b"text\n"}.get(name):
        buffered = io.BufferedReader(_After(first, stream))
    (tmp_path / name).touch()
    monkeypatch.setattr("octad.text.documents._open", lambda path, packed: buffered)
    monkeypatch.setattr("octad.text.windows.MOST_CHARACTERS", 1 << 16)
    windows = read_windows([tmp_path / name], TOKENIZER, tokens=256, window=32)
    assert sum(len(w.ids) for w in windows) == 256
    assert stream.given <= 1 << 20


class _After(io.RawIOBase):
    def __init__(self, first: bytes, then: Counted) -> None:
        super().__init__()
        self.first, self.then = first, then

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.first:
            count = len(self.first)
            buffer[:count], self.first = self.first, b""
            return count
        return self.then.readinto(buffer)


def test_each_file_has_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        rows = [{"text": name * 40} for _ in range(200)]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    monkeypatch.setattr("octad.text.windows.MOST_CHARACTERS", 800)
    monkeypatch.setattr("octad.text.windows.CHARACTERS_PER_TOKEN", 1)
    windows = read_windows([tmp_path / "*.jsonl"], TOKENIZER, tokens=800, window=40)
    said = [TOKENIZER.decode(w.ids)[0] for w in windows]
    assert said.count("a") == said.count("b") == 10


# ---- the commands that read ----------------------------------------------------------------------------------


def test_domains_name_files_patterns_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "domains.yaml"
    path.write_text("domains: {a: x.csv, b: [y/*.jsonl, 'hf:a/b:test'], c: {files: z.tsv, field: body}}")
    found = read_domains(path)
    assert found["a"] == [tmp_path / "x.csv"]
    assert [str(part) for part in found["b"]] == [str(tmp_path / "y/*.jsonl"), "hf:a/b:test"]
    assert found["c"] == TextFiles([str(tmp_path / "z.tsv")], "body")


def test_a_recipe_names_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body\nhello\n")
    experts = [{"name": n, "model": "base", "data": "*.csv", "field": "body"} for n in ("one", "two")]
    recipe = Recipe.from_dict({"base": "b", "experts": experts}, tmp_path)
    check_files(recipe)
    with pytest.raises(DataError, match=r"expert 'one': .*line 2: expected an object with 'text'.*keys body"):
        check_files(
            Recipe.from_dict({"base": "b", "experts": [e | {"field": "text"} for e in experts]}, tmp_path)
        )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a"])
@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (gzip.compress, "gzip.*ends in .gz"),
        (zstandard.compress, "Zstandard.*ends in .zst"),
        (bz2.compress, "bzip2.*unpack it first"),
        (lzma.compress, "xz.*unpack it first"),
    ],
    ids=["gzip", "zstd", "bzip2", "xz"],
)
def test_what_is_packed_under_another_name_is_called_so(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes], said: str
) -> None:
    """It was "not UTF-8 text; convert it first", which it is not for want of an encoding."""
    (tmp_path / name).write_bytes(pack(lines(OBJECTS)))
    with pytest.raises(DataError, match=f"{name}: is no text but packed .{said}"):
        list(read_documents(tmp_path / name))


def test_a_table_of_parquet_under_another_name_and_what_is_packed_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(saved_as_parquet())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(gzip.compress(lines(OBJECTS))))
    for name, said in (("a.jsonl", "Parquet"), ("a.jsonl.gz", "gzip")):
        with pytest.raises(DataError, match=said):
            list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    "text",
    [json.dumps(OBJECTS, indent=1), "".join(map(json.dumps, OBJECTS)), ",\n".join(map(json.dumps, OBJECTS))],
    ids=["a list over lines", "without line ends", "parted by commas"],
)
def test_what_is_json_but_not_by_lines_is_told_how(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"a.jsonl line 1: not JSON: .*give one object a line, or .* \.json$"):
        list(read_documents(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps(OBJECTS))
    with pytest.raises(DataError, match="found list; give each row as such an object"):
        list(read_documents(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_wide_encoding_is_called_by_its_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("sea", encoding=encoding)
    with pytest.raises(DataError, match=f"not UTF-8 text but {encoding.upper()}; convert"):
        list(read_documents(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv.gz"])
def test_text_in_the_place_of_a_list_of_texts_is_called_so(tmp_path: Path, name: str) -> None:
    """As `octad evaluate --data a.jsonl` has it, which was "not valid YAML"."""
    (tmp_path / name).write_bytes(lines(OBJECTS))
    with pytest.raises(DataError, match=rf"{name}: is text; give a .yaml file .* domains: {{law: {name}}}"):
        read_domains(tmp_path / name)
