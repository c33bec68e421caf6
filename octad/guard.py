"""JSON and YAML that others wrote, opened in one place with limits on everything that could do harm.

    read_object(directory / "config.json")              # a JSON object; CheckpointError in one line
    parse_json(text, "talk.json", DataError)            # any JSON value
    read_text(Path("keys.txt"))                         # a text; DataError in one line
    parse_yaml(path.read_bytes())                       # plain data; yaml.YAMLError
    matches(pattern, name, "adapter_config.json")       # a regular expression of a file, which could run for ever
    json.dumps(jsonable(result))                        # the other way: what any parser reads

Limits: bytes, nesting, number of values (YAML: as if aliases were written out), digits of a number. Refused too: halves
of surrogate pairs (no UTF-8 file can hold them again), NUL characters (no path can), keys that occur twice, and tags
of YAML for more than plain data. Dates stay text. What the values mean is for whoever asked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import yaml

from octad.errors import CheckpointError, DataError, OctadError

if TYPE_CHECKING:
    import regex

JSON_BYTES = 256 << 20  # the largest tokenizer.json of the hub has less than 100 MB
YAML_BYTES = 2 << 20  # read by a parser that takes seconds for a megabyte
DEPTH = 100
UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
VALUES = 20_000_000
YAML_VALUES = 500_000
LARGEST = 2**127  # tokenizers write 10**30 for "no limit"
PATTERN_LENGTH, PATTERN_SECONDS = 10_000, 1.0
_SURROGATE, _UNFIT = re.compile("[\ud800-\udfff]"), re.compile("[\x00\ud800-\udfff]")
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


# ---- JSON --------------------------------------------------------------------------------------------------


def read_object(path: Path, error: type[OctadError] = CheckpointError) -> dict[str, Any]:
    """The object in a JSON file. Raises `error` where it cannot be read, is not JSON, or is not an object."""
    found = read_json(path, error)
    if not isinstance(found, dict):
        raise error(f"{path}: should hold one JSON object, found {type(found).__name__}")
    return found


def read_json(
    path: Path, error: type[OctadError] = CheckpointError, complaint: str = "is not valid JSON"
) -> Any:
    """The value in a JSON file; a byte-order mark is no part of it. Raises `error`."""
    return parse_json(read_bytes(path, error), str(path), error, complaint=complaint)


def parse_json(
    text: str | bytes,
    where: str,
    error: type[OctadError] = CheckpointError,
    *,
    complaint: str = "is not valid JSON",
    prose: bool = False,
    finite: bool = False,
) -> Any:
    """The value that a JSON text holds; `where` and `complaint` begin what is said otherwise. In `prose` NUL is a
    character like others. `finite`: NaN and Infinity, which Python writes and JSON has not, are refused, and so are
    numbers that would become them. Raises `error`."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        floats: dict[str, Any] = {"parse_float": _finite, "parse_constant": _finite} if finite else {}
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_unique, **floats)
        check_plain(value, unfit=None if "\\" not in text else _SURROGATE if prose else _UNFIT)
    except RecursionError:
        raise error(f"{where}: {complaint}: nested deeper than {DEPTH} levels") from None
    except ValueError as reason:
        raise error(f"{where}: {complaint}: {reason}") from None
    return value


def read_bytes(path: Path, error: type[OctadError] = CheckpointError, most: int = JSON_BYTES) -> bytes:
    """A file's bytes, if they are no more than `most`. Raises `error`."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as reason:
        raise error(f"{_short(path)}: cannot be read: {reason.strerror}") from None
    except ValueError:  # a NUL in its name
        raise error(f"{str(path)!r}: cannot be read: no such name is possible") from None
    if len(data) > most:
        raise error(f"{path}: has more than {most:,} bytes, which no such file needs")
    return data


def read_text(path: Path, error: type[OctadError] = DataError, what: str = "") -> str:
    """A file's text; a byte-order mark is no part of it. `what`: a word for it, with a blank before. Raises
    `error` where it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as reason:  # ValueError: no UTF-8, or a NUL in its name
        raise error(f"{path}:{what} cannot be read ({getattr(reason, 'strerror', None) or reason})") from None


def exists(path: Path) -> bool:
    """Whether there is such a file or directory; False too for a name that none can have (too long, with a NUL)."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_plain(value: Any, unfit: re.Pattern[str] | None = _UNFIT) -> None:
    """Raises ValueError for plain data that is nested too deep, has too many values, or holds `unfit` characters."""
    level, depth, count = [value], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH} levels")
        if count > VALUES:
            raise ValueError(f"more than {VALUES:,} values")
        if unfit is not None:
            _check_strings(level, unfit)
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]


def _inside(value: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _check_strings(values: Iterable[Any], unfit: re.Pattern[str] = _UNFIT) -> None:
    for value in values:
        if isinstance(value, str) and (found := unfit.search(value)):
            what = (
                "a NUL character"
                if found[0] == "\0"
                else "half of a surrogate pair, which is no character of UTF-8"
            )
            raise ValueError(f"a string holds {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {_short(twice)!r} occurs twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 40 or not -LARGEST < (value := int(digits)) < LARGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {_short(text)}, which JSON does not have or nobody can compute with")
    return value


def _short(text: object) -> str:
    words = str(text)
    return words if len(words) <= 200 else f"{words[:100]}...{words[-40:]}"


# ---- YAML --------------------------------------------------------------------------------------------------


def parse_yaml(text: str | bytes) -> Any:
    """Plain data. Raises yaml.YAMLError for whatever is wrong, a key that occurs twice among it."""
    if len(text) > YAML_BYTES:
        raise yaml.YAMLError(f"more than {YAML_BYTES:,} bytes")
    try:
        return yaml.load(text.decode("utf-8-sig") if isinstance(text, bytes) else text, _PlainLoader)
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise yaml.YAMLError(f"nested deeper than {DEPTH} levels") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML as JSON has it: strings, numbers, true and false, null, lists and mappings, each key once."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def add_indent(self, column: int) -> bool:
        """One block deeper; the scanner's own, with a limit."""
        if len(self.indents) > DEPTH:
            self._refuse(f"nested deeper than {DEPTH} levels")
        return bool(super().add_indent(column))

    def fetch_flow_collection_start(self, token: Any) -> None:
        """One bracket deeper; the scanner's own, with a limit."""
        if self.flow_level > DEPTH:
            self._refuse(f"nested deeper than {DEPTH} levels")
        super().fetch_flow_collection_start(token)

    def get_single_node(self) -> Any:
        """The document, if it is no larger than allowed once its aliases are written out."""
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; whatever a tag's reader trips over is an error of the file."""
        if node.tag.removeprefix("tag:yaml.org,2002:") not in (*_TAGS, "merge", "value"):
            self._refuse(f"tag {_short(node.tag)!r} is for more than plain data", node)
        try:
            value = super().construct_object(node, deep)
            if type(value) is int:
                _integer(str(value))
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            self._refuse(f"{_short(node.value)!r} is no {node.tag.rpartition(':')[2]} ({error})", node)
        if isinstance(value, str):
            try:
                _check_strings([value])
            except ValueError as error:
                self._refuse(str(error), node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; the library takes the last of two equal keys in silence."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                self._refuse(f"key {_short(key.value)!r} occurs twice", key)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def _measure(self, node: yaml.Node, known: dict[int, int]) -> int:
        """How many values a node stands for. An alias within what it stands for has no end."""
        if known.setdefault(id(node), -1) < 0:
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                inner = node.value
            size = 1
            for part in inner:
                if known.get(id(part)) == -1:
                    self._refuse("an alias stands for what it lies in", part)
                size += self._measure(part, known)
            if size > YAML_VALUES:
                self._refuse(f"its aliases stand for more than {YAML_VALUES:,} values", node)
            known[id(node)] = size
        return known[id(node)]

    def _refuse(self, reason: str, node: yaml.Node | None = None) -> NoReturn:
        mark = node.start_mark if node is not None else self.get_mark()
        raise yaml.constructor.ConstructorError(None, None, reason, mark)


# ---- regular expressions -------------------------------------------------------------------------------------


def matches(
    pattern: str,
    text: str,
    where: str,
    how: Literal["fullmatch", "match", "search"] = "fullmatch",
    error: type[OctadError] = CheckpointError,
) -> bool:
    """Whether a regular expression that a file holds matches a text: all of it, its start, or some part.

    Raises `error`, beginning with `where`, for one that is none, or that takes longer than PATTERN_SECONDS: a
    backtracking matcher can need ages for thirty characters."""
    import regex  # late: `re` with a time limit

    try:
        return getattr(_compiled(pattern), how)(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        reason = "takes for ever; write it without nested repeats"
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, regex.error) as problem:
        reason = f"is none that can be used ({problem})"
    raise error(f"{where}: the regular expression {_short(pattern)!r} {reason}")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > PATTERN_LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters")
    import regex

    return regex.compile(pattern)


# ---- what we write ------------------------------------------------------------------------------------------------


def jsonable(value: Any) -> Any:
    """Plain data that any JSON parser reads: dataclasses and mappings with text as keys, lists for tuples, None for
    numbers that are none (NaN, infinite), U+FFFD for characters that no file may hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {jsonable(str(k)): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, str):
        return UNFIT.sub("\ufffd", value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
