"""Chat templates: the Jinja programs that turn messages into a prompt, run as untrusted code.

The environment is the one that templates on the hub are written for (transformers'
utils/chat_template_utils.py): sandboxed and immutable, trim_blocks and lstrip_blocks, loop controls, a tojson
that does not escape HTML, raise_exception and strftime_now; `{% generation %}` blocks render as their
content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octad.errors import CheckpointError, DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


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
    """The prompt of a chat. Raises DataError for what the caller can mend in the messages, CheckpointError
    for a broken template.
    """
    chat = [_checked(message, i) for i, message in enumerate(messages)]
    try:
        return _environment().from_string(template).render(messages=chat, **variables)
    except (_Refused, jinja2.UndefinedError) as error:
        raise DataError(f"{label}: the chat template refuses these messages: {_one_line(error)}") from error
    except Exception as error:  # a template can fail in any way a program can
        raise CheckpointError(
            f"{label}: the chat template fails: {type(error).__name__}: {_one_line(error)}"
        ) from error


def _checked(message: Any, index: int) -> dict[str, Any]:
    """A copy of a message that has a known role and something to say."""
    if not isinstance(message, Mapping):
        raise DataError(
            f"message {index}: should be an object with 'role' and 'content', found {type(message).__name__}"
        )
    if (role := message.get("role")) not in ROLES:
        raise DataError(f"message {index}: unknown role {role!r} (known: {', '.join(ROLES)})")
    if "content" not in message and "tool_calls" not in message:
        raise DataError(f"message {index}: has no 'content'")
    return dict(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
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
