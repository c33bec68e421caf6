"""Calls found in what a model says, piece by piece, in the forms that models were taught.

    for piece in (parser := CallParser(names)).push(text): ...      # str, or CallDelta
    list(parser.finish())                                           # what was held back

`CallParser` reads <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call> (Hermes, Qwen), the others Llama's bare
JSON, Mistral's two forms and Qwen-Coder's tags. A parser works letter by letter, so that streamed and whole answers
cannot differ: a call's name comes once, its arguments as they are written. What looks like a call and is none is text.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from octad.text.chat_messages import CALL, CALL_END

_NAME = r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(,\s*"(?:arguments|parameters)"\s*:\s*|\})'
HEAD = re.compile(rf"\s*{_NAME}")
PATIENCE = 1000  # characters after which what began like a call is none


@dataclass(frozen=True)
class CallDelta:
    """Something of a call: its place among the answer's calls; id and name with the first piece only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallParser:
    """Tells calls from text in an answer that comes in pieces."""

    begin, head, first = CALL, HEAD, "text"

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held, self._state = "", self.first
        self._depth, self._quoted, self._escaped, self._begun = 0, False, False, False
        # whether text has come out since the last call; white space held back
        self._said, self._blank = False, ""
        self.calls = 0

    def push(self, text: str) -> Iterator[str | CallDelta]:
        """What the next piece of the answer shows to be text or a call."""
        self._held += text
        before = None
        while self._held and before != (self._held, self._state):
            before = self._held, self._state
            yield from getattr(self, f"_in_{self._state}")()

    def finish(self) -> Iterator[str | CallDelta]:
        """The answer is over: what was held back."""
        if self._state in ("text", "start"):
            yield from self._text(self._held)
        elif self._state == "head":
            yield from self._text(self.begin + self._held)
        self._held = ""

    def _text(self, text: str) -> Iterator[str]:
        """Text; white space alone, before and between calls, is none."""
        self._blank += text
        if self._said or self._blank.strip():
            text, self._blank, self._said = self._blank, "", True
            if text:
                yield text

    def _in_text(self) -> Iterator[str | CallDelta]:
        at = self._held.find(self.begin)
        if at >= 0:
            text, self._held, self._state = self._held[:at], self._held[at + len(self.begin) :], "head"
            yield from self._text(text)
            self._blank, self._said = "", False
            return
        keep = _overlap(self._held, self.begin)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._text(text)

    def _in_head(self) -> Iterator[str | CallDelta]:
        match = self.head.match(self._held)
        if match is None:
            if self._no_head():
                yield from self._no_call()
            return
        if (name := self._named(match)) not in self._names:
            yield from self._no_call()
            return
        self._held = self._held[match.end() :]
        empty = match[match.re.groups] == "}"
        self._depth, self._quoted, self._escaped, self._begun = 0, False, False, False
        yield CallDelta(self.calls, "{}" if empty else "", self._new_id(), name)
        self.calls += 1
        self._state = "tail" if empty else "arguments"
        self._headed(str(name), empty=empty)

    def _named(self, match: re.Match[str]) -> str | None:
        try:
            return str(json.loads(match[1]))
        except ValueError:  # an escape that JSON does not know
            return None

    def _no_head(self) -> bool:
        """Whether no head of a call can come any more."""
        return CALL_END in self._held

    def _no_call(self) -> Iterator[str]:
        text, self._held, self._state = self.begin + self._held, "", "text"
        yield from self._text(text)

    def _headed(self, name: str, *, empty: bool) -> None:
        """A call of this tool has begun."""

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _in_arguments(self) -> Iterator[str | CallDelta]:
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        for at, sign in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or sign != '"'
                self._escaped = sign == "\\" and not self._escaped
            elif sign == '"':
                self._quoted = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    end = at + 1 if self._depth == 0 else at
                    text, self._held, self._state = self._held[:end], self._held[end:], "tail"
                    yield CallDelta(self.calls - 1, text)
                    return
        text, self._held = self._held, ""
        yield CallDelta(self.calls - 1, text)

    def _in_tail(self) -> Iterator[str | CallDelta]:
        at = self._held.find(CALL_END)
        if at >= 0:
            self._held, self._state = self._held[at + len(CALL_END) :].lstrip("\n"), "text"
        yield from ()


class BareParser(CallParser):
    """Llama 3's: an answer that begins with {"name": NAME, "parameters": OBJECT}, maybe after <|python_tag|>; others
    follow after a semicolon."""

    begin, first, tag, opening = "", "start", "<|python_tag|>", '{"name"'

    def _in_start(self) -> Iterator[str | CallDelta]:
        text = self._held.lstrip()
        if text.startswith(self.tag):
            text = text[len(self.tag) :].lstrip()
        if text.startswith(self.opening):
            self._held, self._state = text, "head"
        elif not self.opening.startswith(text) and not self.tag.startswith(text):
            self._state = "text"
        yield from ()

    def _in_text(self) -> Iterator[str | CallDelta]:
        text, self._held = self._held, ""
        yield from self._text(text)

    def _no_head(self) -> bool:
        return len(self._held) > PATIENCE

    def _headed(self, name: str, *, empty: bool) -> None:
        self._closed = empty

    def _in_tail(self) -> Iterator[str | CallDelta]:
        if not self._closed:
            at = self._held.find("}")
            self._held, self._closed = self._held[at + 1 :] if at >= 0 else "", at >= 0
        text = self._held.lstrip("; ,\n")
        if self._closed and text.startswith(self.opening):
            self._held, self._state = text, "head"
        elif self._closed and not self.opening.startswith(text):
            self._state = "text"
        yield from ()


class MistralParser(CallParser):
    """Mistral's first: [TOOL_CALLS] [{"name": NAME, "arguments": OBJECT}, ...]; maybe each with an id."""

    begin, head = "[TOOL_CALLS]", re.compile(rf"\s*(?:[\[,]\s*)?{_NAME}")
    ending = re.compile(r'\s*(?:,\s*"id"\s*:\s*"[^"]*"\s*)?\}\s*')

    def _no_head(self) -> bool:
        return len(self._held) > PATIENCE

    def _headed(self, name: str, *, empty: bool) -> None:
        self._closed = empty

    def _new_id(self) -> str:
        return mistral_id(secrets.token_hex(12))

    def _in_tail(self) -> Iterator[str | CallDelta]:
        if not self._closed and (match := self.ending.match(self._held)):
            self._held, self._closed = self._held[match.end() :], True
        text = self._held.lstrip()
        if self._closed and text:
            self._held, self._state = text[1:], "head" if text[0] == "," else "text"
        yield from ()


class MistralArgsParser(CallParser):
    """Mistral's later: [TOOL_CALLS]NAME[ARGS]OBJECT, one after the other."""

    begin = "[TOOL_CALLS]"
    head = re.compile(r"\s*([A-Za-z0-9_.:-]+)(?:\[CALL_ID\][^\[]*)?(\[ARGS\])\s*")

    def _named(self, match: re.Match[str]) -> str | None:
        return match[1]

    def _no_head(self) -> bool:
        return len(self._held) > PATIENCE

    def _new_id(self) -> str:
        return mistral_id(secrets.token_hex(12))

    def _in_tail(self) -> Iterator[str | CallDelta]:
        self._state = "text"
        yield from ()


class TagParser(CallParser):
    """Qwen-Coder's: <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>, made into JSON.
    `texts`: by tool, the parameters whose values are texts as they stand; others are JSON."""

    head = re.compile(r"\s*<function=([^>\n]+)(>)\s*")
    opened, closed = re.compile(r"\s*<parameter=([^>\n]+)>"), re.compile(r"\s*</function>")
    end = "</parameter>"

    def __init__(self, names: Sequence[str], texts: Mapping[str, frozenset[str]]) -> None:
        super().__init__(names)
        self._texts, self._tool, self._count, self._as_text, self._fresh = texts, "", 0, False, False

    def _named(self, match: re.Match[str]) -> str | None:
        return match[1]

    def _headed(self, name: str, *, empty: bool) -> None:
        self._tool, self._count = name, 0

    def _in_arguments(self) -> Iterator[str | CallDelta]:
        if match := self.opened.match(self._held):
            self._held, self._state, self._fresh = self._held[match.end() :], "value", True
            self._as_text = match[1] in self._texts.get(self._tool, ())
            key = json.dumps(match[1], ensure_ascii=False)
            yield self._more(("{" if not self._count else ", ") + key + ": " + '"' * self._as_text)
            self._count += 1
        elif match := self.closed.match(self._held):
            self._held, self._state = self._held[match.end() :], "tail"
            yield self._more("}" if self._count else "{}")

    def _in_value(self) -> Iterator[str | CallDelta]:
        if self._fresh:  # the line's end after the tag is none of the value's
            self._held, self._fresh = self._held.removeprefix("\n"), False
        at = self._held.find(self.end)
        if at >= 0:
            value, self._held, self._state = (
                self._held[:at].removesuffix("\n"),
                self._held[at + len(self.end) :],
                "arguments",
            )
            yield self._more(_inside(value) + '"' if self._as_text else _as_json(value))
        elif self._as_text:
            keep = max(_overlap(self._held, "\n" + self.end), _overlap(self._held, self.end))
            value, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if value:
                yield self._more(_inside(value))

    def _more(self, arguments: str) -> CallDelta:
        return CallDelta(self.calls - 1, arguments)


def mistral_id(seed: str) -> str:
    """Nine letters or digits, which Mistral's templates insist on; the same for the same seed."""
    signs = string.ascii_letters + string.digits
    if len(seed) == 9 and all(sign in signs for sign in seed):
        return seed
    number = int.from_bytes(sha256(seed.encode("utf-8", "replace")).digest())
    return "".join(signs[number // 62**place % 62] for place in range(9))


def texts_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, frozenset[str]]:
    """By tool, the parameters that are texts."""
    found = {}
    for tool in tools:
        function = tool["function"]
        properties = (function.get("parameters") or {}).get("properties") or {}
        found[function["name"]] = frozenset(
            key
            for key, schema in properties.items()
            if isinstance(schema, Mapping) and schema.get("type") == "string"
        )
    return found


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of the text with which the mark could begin."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


def _inside(text: str) -> str:
    """A text between the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(value: str) -> str:
    """A value that is JSON as it stands; anything else is a text."""
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return json.dumps(value, ensure_ascii=False)
    return value.strip()
