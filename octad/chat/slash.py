"""What can be said to octad instead of to the model: lines that begin with a slash.

    reply = run(session, "/set temperature 0.2")       # Reply("temperature 0.2")
    reply.then                                         # "retry": give another answer; "quit"; "legend"; or "" for nothing

The same commands work at the prompt and in a pipe. `//text` is a message that begins with a slash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from octad.chat.session import Session
from octad.chat.speakers import hint
from octad.errors import RequestError

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
}
OPTIONAL = ("max_tokens", "seed")  # settings that can be `none`
KEYS = """
Enter sends; Alt-Enter, or a backslash at the end of a line, begins a new one.
Ctrl-C stops the answer (what was said so far stays) or clears the line.
Ctrl-D leaves. //text sends a message that begins with a slash.
Answers are shown as Markdown; with /experts on as plain text instead,
each word in the colour of its main expert."""


@dataclass(frozen=True)
class Reply:
    """What a command has to say, and what is to be done next."""

    text: str = ""
    then: Literal["", "retry", "legend", "quit"] = ""


@dataclass(frozen=True)
class Command:
    """A name, what may follow it, one line of help, what it does, and what its argument can be completed to."""

    name: str
    argument: str
    help: str
    run: Callable[[Session, str], Reply]
    choices: Callable[[Session], Iterable[str]] = lambda session: ()


def is_command(line: str) -> bool:
    """True for a line to octad, not to the model."""
    return line.startswith("/") and not line.startswith("//")


def as_message(line: str) -> str:
    """The message that a line which is no command stands for."""
    return line[1:] if line.startswith("//") else line


def run(session: Session, line: str) -> Reply:
    """Carry out a line that begins with a slash. Raises OctadError for an unknown command or a bad argument."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise RequestError(f"{name}: no such command; {hint(name, COMMANDS)}")
    if argument.strip() and not command.argument:
        raise RequestError(f"{name} takes nothing after it, found {argument.strip()!r}")
    return command.run(session, argument.strip())


def _help(session: Session, argument: str) -> Reply:
    usage = [(f"{c.name} {c.argument}".rstrip(), c.help) for c in COMMANDS.values()]
    return Reply("\n".join(f"{left:24}{right}" for left, right in usage) + "\n" + KEYS)


def _reset(session: Session, argument: str) -> Reply:
    session.reset()
    return Reply("a new conversation" + ("; the system text stays" if session.system else ""))


def _system(session: Session, argument: str) -> Reply:
    if argument:
        session.set_system(None if argument == "off" else argument)
    return Reply(f"system text: {session.system or 'none'}")


def _set(session: Session, argument: str) -> Reply:
    if not argument:
        return Reply("\n".join(f"{name:20}{_shown(session, name)}" for name in SETTINGS))
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    name = name.replace("-", "_")
    if name not in SETTINGS:
        raise RequestError(f"/set {name}: no such setting; {hint(name, SETTINGS)}")
    if value.strip():
        session.params = replace(session.params, **{name: _value(name, value.strip())})
    return Reply(f"{name} {_shown(session, name)}")


def _shown(session: Session, name: str) -> str:
    value = getattr(session.params, name)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str) -> Any:
    if name in OPTIONAL and text == "none":
        return None
    try:
        return SETTINGS[name](text)
    except ValueError:
        kind = "a whole number" if SETTINGS[name] is int else "a number"
        raise RequestError(f"/set {name}: expected {kind}, found {text!r}") from None


def _save(session: Session, argument: str) -> Reply:
    path = _path("/save", argument)
    session.save(path)
    return Reply(f"saved {_turns(len(session.turns))} in {path}")


def _load(session: Session, argument: str) -> Reply:
    path = _path("/load", argument)
    session.load(path)
    return Reply(f"loaded {_turns(len(session.turns))} from {path}")


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise RequestError(f"{name} needs a file name, such as {name} talk.json")
    if len(argument) > 2 and argument[0] == argument[-1] and argument[0] in "\"'":  # as in a shell
        argument = argument[1:-1]
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise RequestError(f"{argument}: there is no such user's home") from None


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"


def _experts(session: Session, argument: str) -> Reply:
    _require_experts(session)
    if argument not in ("", "on", "off"):
        raise RequestError(f"/experts: expected on or off, found {argument!r}")
    if argument:
        session.show_speakers = argument == "on"
    if argument == "off":
        return Reply("answers as Markdown")
    return Reply("each word in the colour of its main expert:" if argument else "", "legend")


def _only(session: Session, argument: str) -> Reply:
    _require_experts(session)
    if argument:
        session.only(None if argument == "off" else argument)
    return Reply(f"only {session.speaker} answers" if session.speaker else "the routers choose the experts")


def _require_experts(session: Session) -> None:
    if not session.llm.expert_names:
        raise RequestError("this model is dense: it has no experts")


def _retry(session: Session, argument: str) -> Reply:
    same = session.params.temperature == 0
    return Reply(
        "temperature is 0: the answer will be the same (/set temperature 0.8)" if same else "", "retry"
    )


def _undo(session: Session, argument: str) -> Reply:
    question = " ".join(session.undo().question.split())
    return Reply(f"took back: {question if len(question) <= 60 else question[:59] + '…'}")


def _quit(session: Session, argument: str) -> Reply:
    return Reply(then="quit")


COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "", "this list", _help),
        Command("/reset", "", "forget the conversation, keep system text and settings", _reset),
        Command("/system", "[TEXT|off]", "show or change what the model is told to be", _system),
        Command("/set", "[NAME VALUE]", "show or change temperature, top_p, ...", _set, lambda s: SETTINGS),
        Command("/save", "FILE", "write the conversation as JSON", _save),
        Command("/load", "FILE", "go on with a saved conversation", _load),
        Command("/experts", "[on|off]", "colour each word by its expert", _experts, lambda s: ("on", "off")),
        Command(
            "/only",
            "[NAME|off]",
            "let one expert say everything",
            _only,
            lambda s: [*s.llm.expert_names, "off"],
        ),
        Command("/retry", "", "another answer to the last question", _retry),
        Command("/undo", "", "take the last question and its answer back", _undo),
        Command("/quit", "", "leave", _quit),
    )
}
