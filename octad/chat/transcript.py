"""What was said, and the file that keeps it: plain JSON in the form that chat programs exchange.

write(Path("talk.json"), "mixture/", "Be brief.", [Turn("Hi", "Hello!")])
system, turns = read(Path("talk.json"))

{"model": "mixture/", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octad.errors import DataError, OutputError
from octad.guard import read_json
from octad.staging import replace_file


@dataclass(frozen=True)
class Turn:
    """A question and its answer, which may be cut short."""

    question: str
    answer: str


def messages(system: str | None, turns: Sequence[Turn], question: str | None = None) -> list[dict[str, str]]:
    """What a chat template reads: the system text, the turns, and the question that waits for an answer."""
    found = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        found.append({"role": "user", "content": turn.question})
        found.append({"role": "assistant", "content": turn.answer})
    return found + ([{"role": "user", "content": question}] if question is not None else [])


def write(path: Path, model: str, system: str | None, turns: Sequence[Turn]) -> None:
    """Save a conversation, whole or not at all. Raises OutputError where it cannot, or would replace something else."""
    if path.exists() and not _is_conversation(path):
        raise OutputError(f"{path}: exists and is no saved conversation; give another name")
    content = {"model": model, "messages": messages(system, turns)}
    replace_file(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def read(path: Path) -> tuple[str | None, list[Turn]]:
    """System text and turns of a saved conversation: an object with `messages`, or a bare list of them.

    Raises DataError for what is not: one optional system message, then user and assistant in turn."""
    raw = _read_json(path)
    found = raw.get("messages") if isinstance(raw, Mapping) else raw
    if not isinstance(found, list):
        raise DataError(f"{path}: is no saved conversation; expected an object with a list of 'messages'")
    has_system = bool(found) and isinstance(found[0], Mapping) and found[0].get("role") == "system"
    roles = ["system"] * has_system + ["user", "assistant"] * len(found)
    places = enumerate(zip(found, roles, strict=False), start=1)
    texts = [_content(message, role, f"{path}: message {place}") for place, (message, role) in places]
    system = texts.pop(0) if has_system else None
    if len(texts) % 2:
        raise DataError(f"{path}: its last message has no answer; remove it")
    return system, [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


def check_text(text: str, what: str) -> None:
    """Raises DataError for a string that holds bytes which were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} is not valid UTF-8 text") from None


def _content(message: Any, role: str, where: str) -> str:
    """The text of a message, which must have the role that its place asks for."""
    if not isinstance(message, Mapping) or not isinstance(text := message.get("content"), str):
        raise DataError(f"{where}: expected an object with 'role' and a string as 'content'")
    if message.get("role") != role:
        raise DataError(f"{where}: expected the role {role!r}, found {message.get('role')!r}")
    check_text(text, where)
    return text


def _read_json(path: Path) -> Any:
    return read_json(path, DataError, complaint="is not JSON; expected a conversation that /save wrote")


def _is_conversation(path: Path) -> bool:
    try:
        read(path)
    except DataError:
        return False
    return True
