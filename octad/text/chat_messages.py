"""Messages as clients send them, made into what a chat template can read.

    chat = plain_messages(messages)                     # contents are text, arguments of calls are objects
    chat = with_tools(chat, tools)                      # for a template that knows nothing of tools
    chat = simplified(chat)                             # for a template that refuses the roles in this order

Templates are written for transformers' messages: a text as content, a call's arguments as an object. Clients of the
OpenAI protocol send lists of parts, null contents, arguments as JSON text, a `developer`, system messages anywhere. What
has a meaning in text is brought into that form; what has none (pictures, sound) is refused, and nothing is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octad.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}  # where each kind of part has its text
CALL, CALL_END = "<tool_call>", "</tool_call>"
ANSWER, ANSWER_END = "<tool_response>", "</tool_response>"
Messages = list[dict[str, Any]]


def plain_messages(messages: Sequence[Any]) -> Messages:
    """Copies with text as content. Raises DataError, with the message's place, for what is no message or no text."""
    return [_plain(message, place) for place, message in enumerate(messages)]


def _plain(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"message {place}: should be an object with 'role' and 'content', found {type(message).__name__}"
        )
    if (role := message.get("role")) not in ROLES:
        raise DataError(f"message {place}: unknown role {role!r} (known: {', '.join(ROLES)})")
    if not {"content", "refusal"} & message.keys() and not (
        message.get("tool_calls") or message.get("function_call")
    ):
        raise DataError(f"message {place}: has no 'content'")
    found = dict(message) | {"content": _text(message.get("content"), place)}
    if not found["content"] and isinstance(message.get("refusal"), str):
        found["content"] = message["refusal"]
    calls = message.get("tool_calls")
    if message.get("function_call") and not calls:  # the form before `tool_calls`
        calls = [{"type": "function", "function": message["function_call"]}]
    found.pop("function_call", None)
    if calls:
        found["tool_calls"] = [_call(call, place) for call in _list(calls, place)]
    else:
        found.pop("tool_calls", None)  # null or empty: none
    _check_text(found, place)
    return found


def _text(content: Any, place: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise DataError(
            f"message {place}: 'content' should be a text or a list of parts, found {type(content).__name__}"
        )
    return "".join(_part(part, f"message {place}: part {number}") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise DataError(f"{where} is {str(kind)[:50]!r}; this model reads text alone")
    if not isinstance(text := part.get(TEXT_PARTS[kind]), str):
        raise DataError(f"{where} has no text")
    return text


def _list(calls: Any, place: int) -> Sequence[Any]:
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"message {place}: 'tool_calls' should be a list")
    return calls


def _call(call: Any, place: int) -> dict[str, Any]:
    """A call with its arguments as an object, where they are one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"message {place}: a tool call needs a 'function' with a 'name'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = arguments
        arguments = found if isinstance(found, Mapping) else arguments
    return dict(call) | {"function": dict(function) | {"arguments": {} if arguments is None else arguments}}


def _check_text(value: Any, place: int) -> None:
    """Raises DataError for half of a surrogate pair, which no tokenizer reads."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f"message {place}: holds half of a surrogate pair, which is no text; remove it"
            ) from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, place)
            _check_text(item, place)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item, place)


def with_tools(messages: Messages, tools: Sequence[Any]) -> Messages:
    """The tools told in a system text, calls and their answers in the words that it asks for."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "You may call functions. They are, as JSON:\n<tools>\n"
        + listed
        + f'\n</tools>\nTo call one, write {CALL}{{"name": NAME, "arguments": OBJECT}}{CALL_END}.'
    )
    told = tools_as_text(messages)
    if not tools:
        return told
    if told and told[0]["role"] == "system":
        before = told[0]["content"]
        return [told[0] | {"content": f"{before}\n\n{text}" if before else text}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def tools_as_text(messages: Messages, *, answers: bool = True) -> Messages:
    """Calls as text of the assistant and, with `answers`, what tools answered as text of the user, for a template that
    knows neither."""
    found: Messages = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                json.dumps(
                    {"name": call["function"]["name"], "arguments": call["function"]["arguments"]},
                    ensure_ascii=False,
                )
                for call in message["tool_calls"]
            ]
            said = [message["content"]] if message["content"] else []
            text = "\n".join([*said, *(f"{CALL}{call}{CALL_END}" for call in calls)])
            found.append({"role": message["role"], "content": text})
        elif answers and message["role"] in ("tool", "function", "ipython"):
            text = f"{ANSWER}{message['content']}{ANSWER_END}"
            found.append({"role": "user", "content": text})
        else:
            found.append(message)
    return found


def simplified(messages: Messages, *, system: bool) -> Messages:
    """The same said by user and assistant in turn, beginning with the user; with `system`, a system text before it all.
    All other system messages become part of the user's text, neighbours of one role become one message."""
    found: Messages = []
    for place, message in enumerate(messages):
        role = "system" if message["role"] == "developer" else message["role"]
        if role == "system" and (place or not system):
            role = "user"
        if found and found[-1]["role"] == role != "tool":
            both = [text for text in (found[-1]["content"], message["content"]) if text]
            found[-1] = found[-1] | {"content": "\n\n".join(both)}
        else:
            found.append(message | {"role": role})
    first = 1 if found and found[0]["role"] == "system" else 0
    if found[first:] and found[first]["role"] == "assistant":
        found.insert(first, {"role": "user", "content": ""})
    return found
