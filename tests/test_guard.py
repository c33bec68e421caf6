"""What others wrote as JSON, YAML or a regular expression: every accident and every trap is one line, and soon."""

import json
import re
from pathlib import Path

import pytest
import yaml

from octad.errors import CheckpointError, DataError
from octad.guard import matches, parse_json, parse_yaml, read_object


def test_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "\u00e9t\u00e9", "n": [1, null]}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"name": "\u00e9t\u00e9", "n": [1, None]}


def test_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(tmp_path / "a.json") == {"a": 1}
    assert parse_yaml("a: 1".encode("utf-8-sig")) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"\xff": 1}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "should hold one JSON object, found list"),
        (b"null", "should hold one JSON object, found NoneType"),
        (b'{"a":' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100 levels"),
        (b'{"a": 1' + b"0" * 40 + b"}", "a number of 41 digits"),
        (b'{"a": 1' + b"0" * 9000 + b"}", "a number of 9001 digits"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' occurs twice"),
        (b'{"a": ["b\\u0000"]}', "a string holds a NUL character"),
        (b'{"a\\ud800": 1}', "half of a surrogate pair"),
    ],
)
def test_accidents(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_object(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_object(tmp_path / name)
    assert "\0" not in str(caught.value)


def test_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)  # holds nothing on disk
    with pytest.raises(CheckpointError, match="has more than 268,435,456 bytes"):
        read_object(tmp_path / "a.json")


def test_text_may_hold_what_names_may_not() -> None:
    assert parse_json('"a\\u0000b \\ud83d\\ude00"', "line 1", DataError, prose=True) == "a\0b \U0001f600"
    with pytest.raises(DataError, match=r"line 1: not JSON: .*half of a surrogate pair"):
        parse_json('"\\ud83d"', "line 1", DataError, complaint="not JSON", prose=True)


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": 1e999}', "-1e400"])
def test_numbers_that_are_none(text: str) -> None:
    """RFC 8259, 6: no NaN, no Infinity; Python reads both, and reads the largest numbers as the latter."""
    assert json.loads(text) is not None
    with pytest.raises(DataError, match=r"talk: .*number"):
        parse_json(text, "talk", DataError, finite=True)
    assert parse_json("[1.5, -2e-3, 0]", "talk", DataError, finite=True) == [1.5, -0.002, 0]


def test_yaml_is_what_the_library_makes_of_plain_data() -> None:
    text = "a: [1, 2.5, 1.0e-3, 'x', yes, null]\nb: &b {c: d}\ne: *b\nf: {<<: *b, g: 0x10}\nh: |\n  two\n  lines\n"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_dates_are_text() -> None:
    assert parse_yaml("a: 2026-01-02\nb: 2026-99-99\n") == {"a": "2026-01-02", "b": "2026-99-99"}


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "key 'a' occurs twice"),
        (BOMB, "aliases stand for more than 500,000 values"),
        (MERGES, "aliases stand for more than 500,000 values"),
        ("a: &a [1, *a]", "an alias stands for what it lies in"),
        ("[" * 5000, "nested deeper than 100 levels"),
        ("".join(f"{' ' * n}a:\n" for n in range(400)), "nested deeper than 100 levels"),
        ("- " * 3000 + "x", "nested deeper than 100 levels"),
        ("a: " + "9" * 5000, "is no int"),
        ("a: " + "9" * 300, "a number of 300 digits"),
        ("a: !!timestamp x,", "more than plain data"),
        ("a: !!binary '@'", "more than plain data"),
        ("a: !!python/object:os.system {}", "more than plain data"),
        ("a: !!int abc}", "is no int"),
        ("a: !!float x", "is no float"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ('a: "\\0"', "a NUL character"),
        (b"a: \xff", "not UTF-8 text"),
        ("x" * (3 << 20), "more than 2,097,152 bytes"),
        ("? [a]\n: b", "unhashable key"),
    ],
)
def test_traps_in_yaml(text: str | bytes, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=re.escape(message)):
        parse_yaml(text)


def test_patterns_mean_what_re_means() -> None:
    for pattern, text in ((r"(a|b)+\d", "ab1"), (r"a", "ab"), (r"^b", "ab"), (r"(?<=a)b$", "ab")):
        for how in ("fullmatch", "match", "search"):
            assert matches(pattern, text, "here", how) == bool(getattr(re, how)(pattern, text))


@pytest.mark.parametrize("pattern", [r"(a|aa)*$", r"(a|ab?)*$"])
def test_a_pattern_that_never_ends_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="takes for ever"):
        matches(pattern, "a" * 60 + "!", "adapter_config.json: rank_pattern", "match")


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "x" * 20_000, "(?P<a>", "[[:"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="here: the regular expression"):
        matches(pattern, "abc", "here")


def test_json_of_a_large_index_is_read(tmp_path: Path) -> None:
    content = {"weight_map": {f"model.layers.{n}.weight": "model-00001.safetensors" for n in range(50_000)}}
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert read_object(tmp_path / "index.json") == content
