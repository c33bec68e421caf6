"""Chat templates: the Jinja programs that turn messages into a prompt, run as untrusted code.

The environment is the one that templates on the hub are written for (transformers'
utils/chat_template_utils.py): sandboxed and immutable, trim_blocks and lstrip_blocks, loop controls, a tojson
that does not escape HTML, raise_exception and strftime_now; `{% generation %}` blocks render as their
content. Messages are brought into the form that templates read by octad.text.chat_messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from octad.errors import CheckpointError, DataError
from octad.text.chat_messages import CALL, plain_messages, simplified, tools_as_text, with_tools
from octad.text.template_limits import BoundedEnvironment, TooMuch

_OPEN = "\ufdd1"  # a Unicode noncharacter: where a message that is to be continued ends


class _Refused(Exception):
    """raise_exception was called by the template."""


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's tokens for training; here it only passes
    them on.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body stands for the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], label: str
) -> str:
    """The prompt of a chat; a template that knows no tools gets them as text, one that refuses the order of the roles a
    simpler order. With `continue_final_message` among the variables the last message stays open at its end; with
    `calls_as_json` a template that teaches calls of another form than <tool_call> JSON counts as one without tools.

    Raises DataError for what the caller can mend in the messages, CheckpointError for a broken template.
    """
    chat = plain_messages(messages)
    try:
        environment, compiled, known = _compiled(template)
    except Exception as error:  # whatever a broken program can do
        raise CheckpointError(
            f"{label}: the chat template fails: {type(error).__name__}: {_one_line(error)}"
        ) from error
    options = dict(variables)
    open_ended = bool(options.pop("continue_final_message", False))
    if open_ended:
        chat, options = _opened(chat), options | {"add_generation_prompt": False}
    tools, told = options.get("tools") or [], "tools" in known
    if options.pop("calls_as_json", False):
        told = told and calls_are_json(template)
    if tools and not told:
        chat, options = with_tools(chat, tools), options | {"tools": None}
    elif "tool_calls" not in template:
        chat = tools_as_text(chat, answers="tool" not in template)
    if "developer" not in template:
        chat = [m | {"role": "system"} if m["role"] == "developer" else m for m in chat]
    with environment.limited():
        text = _rendered(compiled, chat, options, label)
    if open_ended and _OPEN not in text:
        raise DataError(f"{label}: continue_final_message: the chat template does not show the last message")
    return text[: text.index(_OPEN)] if open_ended else text


@lru_cache(maxsize=8)
def _compiled(template: str) -> tuple[BoundedEnvironment, jinja2.Template, frozenset[str]]:
    """A template as a program, and the variables that it reads; kept, since making one takes longer than most chats."""
    environment = _environment()
    compiled = environment.from_string(template)
    return environment, compiled, frozenset(meta.find_undeclared_variables(environment.parse(template)))


def calls_are_json(template: str) -> bool:
    """Whether calls are taught as <tool_call>{"name": ..., "arguments": ...}</tool_call>: not as Llama 3's bare JSON,
    Mistral's [TOOL_CALLS] or Qwen-Coder's <function=...>."""
    return CALL in template and "<function=" not in template


def _rendered(
    template: jinja2.Template, chat: list[dict[str, Any]], options: Mapping[str, Any], label: str
) -> str:
    """By the template as it is, else in the first simpler form that it takes; its first complaint where it takes none."""
    try:
        return template.render(messages=chat, **options)
    except TooMuch as error:
        raise CheckpointError(f"{label}: the chat template does not end well: {error}") from None
    except Exception as error:  # a template can fail in any way a program can
        complaint = error
    ways = [(True, chat), (False, chat)]
    if any(message.get("tool_calls") for message in chat):  # some know one call a message
        ways.append((True, tools_as_text(chat)))
    for system, simpler in ways:
        try:
            return template.render(messages=simplified(simpler, system=system), **options)
        except Exception:
            continue
    told = _one_line(complaint)
    if isinstance(complaint, (_Refused, jinja2.UndefinedError)):
        place = _first_refused(template, chat, options)
        raise DataError(
            f"{label}: the chat template refuses these messages: {told} (at message {place})"
        ) from complaint
    raise CheckpointError(
        f"{label}: the chat template fails: {type(complaint).__name__}: {told}"
    ) from complaint


def _first_refused(template: jinja2.Template, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> int:
    """The place of the message with which the template begins to refuse."""
    for place in range(len(chat)):
        try:
            template.render(messages=chat[: place + 1], **options)
        except Exception:
            return place
    return len(chat) - 1


def _opened(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With a mark at the end of the last message's text, where the prompt is to end."""
    if not chat:
        raise DataError("continue_final_message: there is no message to continue")
    return [*chat[:-1], chat[-1] | {"content": chat[-1]["content"] + _OPEN}]


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
