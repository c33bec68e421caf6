"""The conversation without a terminal: each line of input is a turn, the answers alone go to the output.

    converse(session, read_lines(), out=Console(), err=Console(stderr=True))

A backslash at the end of a line joins it with the next. Lines with a slash are commands, as at the prompt. The first
mistake ends it, since nobody is there to mend it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from octad.chat import slash as commands
from octad.chat.session import Session
from octad.chat.speakers import Word, write
from octad.chat.transcript import check_text
from octad.errors import DataError

if TYPE_CHECKING:
    from octad.engine.outputs import Delta


def is_terminal() -> bool:
    """True where somebody types the standard input."""
    return sys.stdin is not None and sys.stdin.isatty()  # None: it was closed before the start


def read_lines() -> Iterator[str]:
    """Standard input, line by line as it comes. Raises DataError for bytes that are not UTF-8."""
    try:
        yield from sys.stdin or ()
    except UnicodeDecodeError:
        raise DataError("standard input is not valid UTF-8 text") from None
    except OSError as error:
        raise DataError(f"standard input, instead of a prompt, cannot be read ({error})") from None


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for `-`, without its last line end. Raises DataError for no text."""
    if prompt == "-" and is_terminal():
        raise DataError("there is no prompt; give one after the model, or pipe it in")
    text = "".join(read_lines()).removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise DataError("the prompt is empty; give some text")
    check_text(text, "the prompt")
    return text


def converse(session: Session, lines: Iterable[str], out: Console, err: Console) -> None:
    """Answer every message on `out`; what commands reply and what is left out of the context goes to `err`.

    Raises OctadError."""
    for message in messages(lines):
        if not commands.is_command(message):
            _answer(session, session.ask(commands.as_message(message)), out, err)
            continue
        reply = commands.run(session, message)
        if reply.text:
            err.print(Text(reply.text))
        if reply.then == "retry":
            _answer(session, session.retry(), out, err)
        elif reply.then == "quit":
            return


def _answer(session: Session, deltas: Iterator[Delta], out: Console, err: Console) -> None:
    if session.last and session.last.notice:
        err.print(Text(session.last.notice))
    for delta in deltas:
        write(out, [Word(delta.text, None)])
    write(out, [Word("\n", None)])


def messages(lines: Iterable[str]) -> Iterator[str]:
    """Messages out of lines: continued ones joined, empty ones left out."""
    begun: list[str] = []
    for line in chain(lines, [""]):
        text = line.rstrip("\n")
        begun.append(text.removesuffix("\\"))
        if not text.endswith("\\"):
            if message := "\n".join(begun).strip():
                yield message
            begun = []
