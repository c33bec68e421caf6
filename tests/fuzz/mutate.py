"""Damage to a file's bytes: what disks, editors, other programs and ill will make of it.

mutated(data, random.Random(7), "json")
"""

import json
import random
import re
from typing import Any

NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**40,
    int("9" * 300),
    -(2**70),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    " ",
    "\0",
    "\ud800",
    "x" * 5000,
    "\u202e\n",
    [],
    {},
    [[]],
    {"": None},
]
VALUES += [["a", 1], *NUMBERS]
PIECES = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 3000, b"{" * 3000, b"- " * 500, b"&a [*a]", b"*a", b"<<: *a",
    b"!!python/x ", b"!!timestamp x", b"2026-99-99", b"!!binary '@'", b"!!int abc", b".nan", b".inf", b"9" * 5000, b"-",
    b"1e999", b"\\ud800",
    b"\\u0000", b"{% for a in range(99999) %}", b"\r\n", b"\n", b'"', b"'", b":", b"(a+)+$", b"(" * 200, b"\xf0\x9f",
]  # fmt: skip
NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def mutated(data: bytes, draw: random.Random, kind: str) -> bytes:
    """One to three kinds of damage, by the kind of file ("json", "yaml", "text" or "binary")."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        ways = [flipped, cut, doubled, inserted, shortened]
        if kind in ("json", "yaml"):
            ways += [renumbered, inserted]
        if kind == "binary":
            ways += [overwritten] * 2
        if kind == "json":
            ways += [revalued] * 4
        data = draw.choice(ways)(data, draw)
    return data


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Some bits are others; in a binary file most of them near its head."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 16))):
        if found:
            place = draw.randrange(min(len(found), draw.choice((64, 4096, len(found)))))
            found[place] ^= 1 << draw.randrange(8)
    return bytes(found)


def overwritten(data: bytes, draw: random.Random) -> bytes:
    """A number of four or eight bytes is another, one that lengths and counts are not; most of them near the head."""
    size = draw.choice((4, 8))
    if len(data) < size:
        return data
    place = draw.randrange(min(len(data), draw.choice((64, 4096, len(data)))) - size + 1)
    value = draw.choice(
        (
            0,
            1,
            2,
            7,
            2**16,
            2**31 - 1,
            2**31,
            2**32 - 1,
            2**62,
            2**63 - 1,
            2**63,
            2**64 - 1,
            draw.randrange(300),
        )
    )
    return data[:place] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[place + size :]


def _span(data: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(data) + 1)
    return start, min(len(data), start + draw.choice((1, 3, 20, 400)))


def cut(data: bytes, draw: random.Random) -> bytes:
    """A piece is missing."""
    start, end = _span(data, draw)
    return data[:start] + data[end:]


def doubled(data: bytes, draw: random.Random) -> bytes:
    """A piece is there again, elsewhere."""
    (start, end), place = _span(data, draw), draw.randrange(len(data) + 1)
    return data[:place] + data[start:end] * draw.choice((1, 1, 50)) + data[place:]


def inserted(data: bytes, draw: random.Random) -> bytes:
    """Something that trips readers up."""
    place = draw.randrange(len(data) + 1)
    return data[:place] + draw.choice(PIECES) + data[place:]


def shortened(data: bytes, draw: random.Random) -> bytes:
    """The end is missing."""
    return data[: draw.randrange(len(data) + 1)]


def renumbered(data: bytes, draw: random.Random) -> bytes:
    """A number is another."""
    if not (found := list(NUMBER.finditer(data))):
        return data
    match = draw.choice(found)
    return data[: match.start()] + json.dumps(draw.choice(NUMBERS)).encode() + data[match.end() :]


def revalued(data: bytes, draw: random.Random) -> bytes:
    """A value of a JSON file is of another kind, or a key is gone, or has another name."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting and len(places) < 5000:
        value = waiting.pop()
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        places += [(value, key) for key, _ in inner]
        waiting += (
            [part for _, part in (value.items() if isinstance(value, dict) else enumerate(value))]
            if inner
            else []
        )
    if not places:
        return data
    holder, key = draw.choice(places)
    way = draw.random()
    if way < 0.15:
        del holder[key]
    elif way < 0.25 and isinstance(holder, dict):
        holder[draw.choice(("\0", "x" * 300, "\ud800", "", "../../x"))] = holder.pop(key)
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(root).encode()
