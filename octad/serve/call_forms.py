"""The form in which a model writes its tool calls: which one its chat template teaches, its grammar, and its parser.

    form = CallForm.of(tokenizer)
    form.grammar(tools, choice="auto", several=True, schema=None)        # in Lark's syntax, for the engine
    form.parser(tools)                                                   # for what it says

`json`: <tool_call> with JSON in it (Hermes, Qwen, and every template that knows no tools: these are told them in a system
text); `bare`: Llama 3; `mistral` and `mistral args`; `tags`: Qwen-Coder. With `required` or a named tool the answer is
calls and nothing else; with `auto` whatever begins like a call must go on as one, so a call is always JSON of its schema.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octad.engine.structured import bounded
from octad.serve.call_parsers import (
    BareParser,
    CallParser,
    MistralArgsParser,
    MistralParser,
    TagParser,
    texts_of,
)
from octad.text.chat_messages import CALL, CALL_END
from octad.text.chat_template import calls_are_json
from octad.text.tokenizer import Tokenizer

log = logging.getLogger("octad.serve")
LOOK_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])")
MOST_CALLS = 8  # of one answer, where several are asked for
MOST_LENGTH = 2000  # characters of a text between tags that are counted
VALUE_END = "\n</parameter>\n"
JSON_FORM: dict[str, Any] = {"x-guidance": {"lenient": True, "whitespace_flexible": False}}
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CallForm:
    """`kind` as above; `begin`, `args`, `tag`: control words in Lark's syntax, by id where they are tokens of their own;
    `native`: the template itself tells the tools; `space`: what it writes after the first control word."""

    kind: str = "json"
    native: bool = False
    begin: str = json.dumps(CALL)
    args: str = ""
    tag: str = ""
    space: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> CallForm:
        """What the chat template teaches."""
        template = tokenizer.chat_template or ""

        def sign(text: str) -> str:
            token = tokenizer.core.token_to_id(text)
            return f"<[{token}]>" if token in tokenizer.special_ids else json.dumps(text)

        if "tools" not in template or calls_are_json(template):
            return cls(native="tools" in template, begin=sign(CALL))
        if "<function=" in template and CALL in template:
            return cls("tags", True, sign(CALL))
        if "[TOOL_CALLS]" in template:
            kind = "mistral args" if "[ARGS]" in template else "mistral"
            space = " " if "[TOOL_CALLS] [" in template else ""
            return cls(kind, True, sign("[TOOL_CALLS]"), sign("[ARGS]"), space=space)
        if "<|python_tag|>" in template or '"parameters": dictionary' in template:
            tag = sign(BareParser.tag)
            return cls("bare", True, tag="" if tag.startswith('"') else tag)
        return cls()

    @property
    def hidden(self) -> bool:
        """Whether control words of it are tokens that an answer's text does not show."""
        return any(word.startswith("<[") for word in (self.begin, self.args, self.tag))

    def parser(self, tools: Tools) -> CallParser:
        """For an answer that may call these."""
        names = [tool["function"]["name"] for tool in tools]
        if self.kind == "tags":
            return TagParser(names, texts_of(tools))
        kinds = {"bare": BareParser, "mistral": MistralParser, "mistral args": MistralArgsParser}
        return kinds.get(self.kind, CallParser)(names)

    def grammar(
        self, tools: Tools, *, forced: bool, parallel: bool | None = None, schema: str | None = None
    ) -> str:
        """Calls, and where none is `forced` text around them (or, with `schema`, JSON of it in their place). `parallel`:
        whether there may be several; None: only where text may be, too."""
        apart = schema is not None and not forced
        rules = [f"call_{i}: {self._body(tool, apart=apart)}" for i, tool in enumerate(tools)]
        rules.append("one: " + " | ".join(f"call_{i}" for i in range(len(rules))))
        if forced or schema is not None:
            rules.append(f"called: {self._calls(several=bool(parallel and forced))}")
            start = "called"
            if schema is not None and not forced:
                start = "called | form"
                rules.append(f"form: %json {_text(bounded(json.loads(schema)))}")
        else:
            start, more = self._among_text(several=parallel is not False)
            rules += ["rest: TEXT", *more]
        rules.append("TEXT: /(.|\\n)*/")
        for name in sorted(set(re.findall(r"\bwords_\d*\b", " ".join(rules))) if self.kind == "tags" else ()):
            size = name.removeprefix("words_")
            text = f"/(.|\\n){{0,{size}}}/" if size else "TEXT"
            rules.append(f"{name}[lazy]: {text} {_text(VALUE_END)}")
        return "\n".join(["%llguidance {}", f"start: {start}", *rules]) + "\n"

    def _calls(self, *, several: bool) -> str:
        """The calls of an answer that has nothing else."""
        if self.kind == "bare":
            return (f"{self.tag}? " if self.tag else "") + _listed("one", "; ", several=several)
        if self.kind == "mistral":
            return f"{self.begin} {self._list(several=several)}"
        return _listed(f"{self.begin} one", "" if self.kind == "mistral args" else "\n", several=several)

    def _list(self, *, several: bool) -> str:
        return f'{_text(self.space + "[")} {_listed("one", ", ", several=several)} "]"'

    def _among_text(self, *, several: bool) -> tuple[str, list[str]]:
        """What an answer may be that may also be text, and the rules for it."""
        if self.kind == "bare":
            other = _not_beginning_with(BareParser.opening)
            return "other | called", [f"other: /{other}/", f"called: {self._calls(several=several)}"]
        # a token of its own is no text; letters are found where they come first
        begun = (
            ["begin[lazy]: TEXT " + self.begin]
            if self.begin.startswith('"')
            else [f"begin: TEXT {self.begin}"]
        )
        if self.kind == "mistral":
            return f"rest | begin {self._list(several=several)}", begun
        return "call* rest" if several else "call | rest", [*begun, "call: begin one"]

    def _body(self, tool: Mapping[str, Any], *, apart: bool) -> str:
        """A call, after the control word that begins it; sign by sign where other JSON may stand in its place."""
        function = tool["function"]
        name, schema = function["name"], tolerant(function.get("parameters") or {}, function["name"])
        if self.kind == "tags":
            return _tags(name, schema)
        if self.kind == "mistral args":
            return f"{_text(name)} {self.args} %json {_text(schema)}"
        key = '"parameters"' if self.kind == "bare" else '"arguments"'
        signs = ["{", '"name"', ": ", json.dumps(name), ", ", key, ": "]
        head = " ".join(map(_text, signs)) if apart and self.kind == "bare" else _text("".join(signs))
        end = "}" + CALL_END if self.kind == "json" else "}"
        return f"{head} %json {_text(schema)} {_text(end)}"


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _listed(one: str, between: str, *, several: bool) -> str:
    gap = f"{_text(between)} " if between else ""
    return f"{one} ({gap}{one}){{0,{MOST_CALLS - 1}}}" if several else one


def _not_beginning_with(opening: str) -> str:
    """A pattern of all texts that do not begin so."""
    found = ""
    for sign in reversed(opening):
        own = re.escape(sign).replace("/", "\\/")
        found = rf"([^{own}](.|\n)*|{own}{found})?" if found else rf"([^{own}](.|\n)*)?"
    return found


def _tags(name: str, schema: Mapping[str, Any]) -> str:
    """A call in Qwen-Coder's tags, its parameters in the schema's order; texts stand as they are."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    parts = [_text(f"\n<function={name}>\n")]
    for key, own in (schema.get("properties") or {}).items():
        opened, closed = _text(f"<parameter={key}>\n"), _text(VALUE_END)
        plain = isinstance(own, Mapping) and own.get("type") == "string"
        if plain and isinstance(own.get("enum"), list):
            value = "(" + " | ".join(_text(str(text)) for text in own["enum"]) + f") {closed}"
        elif plain:
            most = own.get("maxLength")
            value = f"words_{most}" if isinstance(most, int) and 0 < most <= MOST_LENGTH else "words_"
        else:
            form = (dict(own) | shared if isinstance(own, Mapping) else {}) | JSON_FORM
            value = f"%json {_text(form)} {closed}"
        needed = key in (schema.get("required") or ())
        parts.append(f"{opened} {value}" if needed else f"({opened} {value})?")
    return " ".join([*parts, _text("</function>\n" + CALL_END)])


def tolerant(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A tool's schema for the grammar: an object; what the grammar's library cannot do (look-around in patterns, rare
    keywords) is left out with a line in the log, since agents send it and a call without that check beats none. Numbers
    have an end."""
    found: dict[str, Any] = bounded(_without_look_around(dict(schema), name))
    found.setdefault("type", "object")
    if found["type"] == "object":
        found.setdefault("properties", {})
        found.setdefault("additionalProperties", bool(not found["properties"] and schema))
    return found | JSON_FORM


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
