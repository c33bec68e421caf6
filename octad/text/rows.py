"""The document that a row holds (an object of named columns): a text, or a chat as a list of messages.

    from_row({"text": "Il pleut."}, "a.jsonl line 1", "text")                       # the text under `field`
    from_row({"messages": [{"role": "user", "content": "Hi"}]}, where, "text")      # a chat
    from_row({"conversations": [{"from": "human", "value": "Hi"}]}, where, "text")  # ShareGPT's way to write one
    from_row({"instruction": "Translate", "input": "sea", "output": "mer"}, where, "text")   # Alpaca's: one answer

A row is what it says, so that texts and chats can lie in one file; one that is both is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octad.errors import DataError

Document = str | list[Any]
SPEAKERS = {  # who speaks in ShareGPT's files -> role
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def from_row(value: Any, where: str, field: str) -> Document:
    """The document of one row. Raises DataError naming the columns found."""
    row = value if isinstance(value, dict) else {}
    if isinstance(row.get(field), str):
        if chats := [key for key in ("messages", "conversations") if isinstance(row.get(key), list)]:
            raise DataError(
                f"{where}: holds a text as {field!r} and a chat as {chats[0]!r}; set field: {chats[0]} for the chat,"
                " or take that out"
            )
        return str(row[field])
    for key in (field, "messages", "conversations"):
        if isinstance(row.get(key), list):
            return [_message(part, f"{where}: {key} {n}") for n, part in enumerate(row[key], 1)]
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return _instruction(row)
    found = f"keys {', '.join(sorted(map(str, row)))}" if row else type(value).__name__
    if field in row:
        raise DataError(
            f"{where}: {field!r} should be a text, found {_kind(row[field])}; leave such rows out"
        )
    wanted = f"an object with {field!r} or 'messages' ('conversations', 'instruction' and 'output')"
    fix = "set field: to the column that has the text" if row else "give each row as such an object"
    raise DataError(f"{where}: expected {wanted}, found {found[:200]}; {fix}")


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _message(part: Any, where: str) -> Any:
    """A message as chat templates know it; ShareGPT calls its parts `from` and `value`."""
    if not isinstance(part, Mapping) or "role" in part or "from" not in part:
        return part
    speaker = part["from"]
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise DataError(f"{where}: is from {speaker!r}; known are {', '.join(SPEAKERS)}")
    if not isinstance(part.get("value"), str):
        raise DataError(f"{where}: has no text as 'value'")
    return {"role": SPEAKERS[speaker.lower()], "content": part["value"]}


def _instruction(row: Mapping[str, Any]) -> Document:
    asked = row["instruction"]
    if isinstance(more := row.get("input"), str) and more.strip():
        asked = f"{asked}\n\n{more}"
    system = row.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    return [*first, {"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
