"""Tools: which the model may call, the grammar that keeps calls valid, and calls found in what it says.

    tools = Toolbox.of(tools, tool_choice, parallel)     # ApiError for what makes no sense
    tools.definitions                                    # for the chat template
    tools.grammar(schema)                                # for the engine: calls are always JSON of their schema
    for piece in (parser := CallParser(tools.names)).push(text): ...      # str, or CallDelta

A call is written as most templates teach it: <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>. With `required`
or a named tool the answer is a call and nothing else; with `auto` whatever begins like a call must go on as one. The
parser works letter by letter, so that streamed and whole answers cannot differ: a call's name comes once, its arguments
as they are written.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octad.engine.structured import bounded
from octad.serve.replies import ApiError
from octad.text.chat_messages import CALL, CALL_END

log = logging.getLogger("octad.serve")
LOOK_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(,\s*"(?:arguments|parameters)"\s*:\s*|\})')
MOST_CALLS = 8  # of one answer, where several are asked for


@dataclass(frozen=True)
class CallDelta:
    """Something of a call: its place among the answer's calls; id and name with the first piece only."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request. `choice`: none, auto, required, or a tool's name. `parallel`: whether several calls are
    asked for at once; None: `required` gives one, `auto` as many as the model makes."""

    definitions: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    parallel: bool | None = None

    @classmethod
    def of(
        cls, tools: Sequence[Any] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
    ) -> Toolbox:
        """From OpenAI's fields. Raises ApiError for a tool or a choice that makes no sense."""
        found = tuple(_checked(tool, place) for place, tool in enumerate(tools or ()))
        names = [tool["function"]["name"] for tool in found]
        wanted = _choice(choice)
        if wanted in (None, "auto", "none"):
            return cls(
                found if wanted != "none" else (),
                "auto" if found and wanted != "none" else "none",
                parallel,
            )
        if not found:
            raise ApiError(400, f"tool_choice: found {wanted!a}, but there are no tools", param="tool_choice")
        if wanted != "required" and wanted[1:] not in names:
            raise ApiError(400, f"tool_choice: no tool is called {wanted[1:]!a}", param="tool_choice")
        return cls(found, wanted, parallel)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tools that may be called."""
        return tuple(tool["function"]["name"] for tool in self.callable)

    @property
    def callable(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the choice allows."""
        if self.choice.startswith("="):
            return tuple(tool for tool in self.definitions if tool["function"]["name"] == self.choice[1:])
        return self.definitions

    @property
    def forced(self) -> bool:
        """Whether the answer is a call and nothing else."""
        return self.choice not in ("auto", "none")

    def grammar(self, schema: str | None = None) -> str:
        """In Lark's syntax: calls, and with `auto` text around them (or, with `schema`, JSON of it in their place)."""
        rules = [f"call_{i}: {_call_rule(tool)}" for i, tool in enumerate(self.callable)]
        calls = " | ".join(f"call_{i}" for i in range(len(rules)))
        if self.forced:
            several = self.parallel and not self.choice.startswith("=")
            start = f'call ("\\n" call){{0,{MOST_CALLS - 1}}}' if several else "call"
            rules += [f"call: {json.dumps(CALL)} ({calls})"]
        elif schema is not None:
            start = "call | form"
            form = json.dumps(bounded(json.loads(schema)), ensure_ascii=False)
            rules += [f"call: {json.dumps(CALL)} ({calls})", f"form: %json {form}"]
        else:
            start = "call | rest" if self.parallel is False else "call* rest"
            rules += [
                "rest: TEXT",
                "TEXT: /(.|\\n)*/",
                f"begin[lazy]: TEXT {json.dumps(CALL)}",
                f"call: begin ({calls})",
            ]
        return "\n".join(["%llguidance {}", f"start: {start}", *rules]) + "\n"


def _choice(choice: str | Mapping[str, Any] | None) -> str | None:
    """None, auto, none, required, or =NAME."""
    if choice is None or choice in ("auto", "none", "required"):
        return choice
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            inner = choice.get("allowed_tools", choice)
            return "required" if isinstance(inner, Mapping) and inner.get("mode") == "required" else "auto"
        function = choice.get("function", choice)
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            return f"={name}"
    raise ApiError(
        400,
        f"tool_choice: found {ascii(choice)[:100]}, allowed: auto, none, required, or an object that names a function",
        param="tool_choice",
    )


def _checked(tool: Any, place: int) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise ApiError(400, f"tools[{place}]: should be an object of type 'function'", param="tools")
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", name):
        raise ApiError(
            400,
            f"tools[{place}].function.name: found {ascii(name)[:100]}, allowed: letters, digits, _ and -",
            param="tools",
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ApiError(400, f"tools[{place}].function.parameters: should be a JSON schema", param="tools")
    return dict(tool)


def _call_rule(tool: Mapping[str, Any]) -> str:
    function = tool["function"]
    schema = tolerant(function.get("parameters") or {}, function["name"])
    head = json.dumps('{"name": ' + json.dumps(function["name"]) + ', "arguments": ')
    return f"{head} %json {json.dumps(schema, ensure_ascii=False)} {json.dumps('}' + CALL_END)}"


def tolerant(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool's schema for the grammar: an object; what the grammar's library cannot do (look-around in patterns, rare
    keywords) is left out with a line in the log, since agents send it and a call without that check beats none. Numbers
    have an end."""
    found: dict[str, Any] = bounded(_without_look_around(dict(schema), name))
    found.setdefault("type", "object")
    if found["type"] == "object":
        found.setdefault("properties", {})
        found.setdefault("additionalProperties", bool(not found["properties"] and schema))
    return found | {"x-guidance": {"lenient": True, "whitespace_flexible": False}}


def _without_look_around(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        kept = {}
        for key, item in value.items():
            if key == "pattern" and isinstance(item, str) and LOOK_AROUND.search(item):
                log.warning(
                    "tool %s: the pattern %s looks around, which is not checked",
                    ascii(name),
                    ascii(item)[:100],
                )
            else:
                kept[key] = _without_look_around(item, name)
        return kept
    return [_without_look_around(item, name) for item in value] if isinstance(value, list) else value


class CallParser:
    """Tells calls from text in an answer that comes in pieces."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)
        self._held, self._state = "", "text"
        self._depth, self._quoted, self._escaped, self._begun = 0, False, False, False
        self._said, self._blank = (
            False,
            "",
        )  # whether text has come out since the last call; white space held back
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
        if self._state == "text":
            yield from self._text(self._held)
        elif self._state == "head":
            yield from self._text(CALL + self._held)
        self._held = ""

    def _text(self, text: str) -> Iterator[str]:
        """Text; white space alone, before and between calls, is none."""
        self._blank += text
        if self._said or self._blank.strip():
            text, self._blank, self._said = self._blank, "", True
            if text:
                yield text

    def _in_text(self) -> Iterator[str | CallDelta]:
        at = self._held.find(CALL)
        if at >= 0:
            text, self._held, self._state = self._held[:at], self._held[at + len(CALL) :], "head"
            yield from self._text(text)
            self._blank, self._said = "", False
            return
        keep = next(
            (
                n
                for n in range(min(len(CALL) - 1, len(self._held)), 0, -1)
                if CALL.startswith(self._held[-n:])
            ),
            0,
        )
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._text(text)

    def _in_head(self) -> Iterator[str | CallDelta]:
        match = HEAD.match(self._held)
        if match is None:
            if CALL_END in self._held:  # no call after all
                text, self._held, self._state = CALL + self._held, "", "text"
                yield from self._text(text)
            return
        try:
            name = json.loads(match[1])
        except ValueError:  # an escape that JSON does not know
            name = None
        if name not in self._names:
            text, self._held, self._state = CALL + self._held, "", "text"
            yield from self._text(text)
            return
        self._held = self._held[match.end() :]
        empty = match[2] == "}"
        self._state = "tail" if empty else "arguments"
        self._depth, self._quoted, self._escaped, self._begun = 0, False, False, False
        yield CallDelta(self.calls, "{}" if empty else "", f"call_{secrets.token_hex(12)}", name)
        self.calls += 1

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
