"""The conversation at a terminal: prompt_toolkit reads, rich writes.

    Screen(session, terminal.out, history=history_file()).run()

Whatever goes wrong with one message is one line, and the conversation goes on. Ctrl-C while the model answers is taken
between two tokens, where the engine is at rest; a second one does not wait for that.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.text import Text

from octad.chat import slash as commands
from octad.chat import speakers
from octad.chat.growing_markdown import GrowingMarkdown
from octad.chat.session import Session
from octad.errors import OctadError
from octad.report import terminal

if TYPE_CHECKING:
    from octad.engine.outputs import Delta

HINT = "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves"


class Screen:
    """A conversation at `console`; `history` is the file that remembers messages (None: only until the end)."""

    def __init__(self, session: Session, console: Console, history: Path | None = None) -> None:
        self.session, self.console = session, console
        self.names = session.llm.expert_names
        self._prompt: PromptSession[str] = PromptSession(
            FormattedText([("bold", "> ")]),
            history=_open_history(history),
            completer=CommandCompleter(session),
            key_bindings=_key_bindings(),
            multiline=True,
            prompt_continuation="  ",
            enable_suspend=True,
        )

    def run(self) -> None:
        """Until Ctrl-D or /quit."""
        if not terminal.err.quiet:
            self._introduce()
        going = True
        while going:
            try:
                line = self._prompt.prompt().strip()
                going = not line or self._take(line)
            except KeyboardInterrupt:
                self._note(HINT)
            except EOFError:
                going = False

    def _take(self, line: str) -> bool:
        """Carry out one line; False to leave."""
        try:
            if commands.is_command(line):
                return self._command(line)
            self._show(self.session.ask(commands.as_message(line)))
        except OctadError as error:
            self.console.print(Text(" ".join(str(error).split()), style="red"))
        return True

    def _command(self, line: str) -> bool:
        reply = commands.run(self.session, line)
        if reply.text:
            self._note(reply.text)
        if reply.then == "legend":
            self._legend()
        elif reply.then == "retry":
            self._show(self.session.retry())
        return reply.then != "quit"

    # ---- the answer ----------------------------------------------------------------------------------------

    def _show(self, deltas: Generator[Delta]) -> None:
        """Stream the answer that the session has just begun, then a line about it."""
        answer = self.session.last
        assert answer is not None
        if answer.notice:
            self._note(answer.notice)
        try:
            self._stream(deltas)
        except KeyboardInterrupt:  # the second Ctrl-C
            self._note("interrupted")
        if not answer.text and not answer.finish_reason:
            self._note("nothing was said; the question is taken back")
            return
        self.console.print()
        if self.session.show_speakers:
            self._legend()
        self._note(answer.summary(self.names))
        self.console.print()

    def _stream(self, deltas: Generator[Delta]) -> None:
        with _stoppable() as stopped, _silent_keys(), closing(deltas):
            with self.console.status("", spinner="dots"):  # the prompt is being read
                first = next(deltas, None)
            view = self._coloured() if self.session.show_speakers else self._markdown()
            with view as show:
                for delta in chain([] if first is None else [first], deltas):
                    show(delta)
                    if stopped.is_set():
                        break

    @contextmanager
    def _markdown(self) -> Iterator[Callable[[Delta], None]]:
        with GrowingMarkdown(self.console) as view:
            yield lambda delta: view.add(delta.text)

    @contextmanager
    def _coloured(self) -> Iterator[Callable[[Delta], None]]:
        words, flow = speakers.Words(), speakers.Flow(self.console)
        try:
            yield lambda delta: flow.write(words.add(delta))
        finally:
            flow.write(words.rest())
            self.console.print()

    def _legend(self) -> None:
        said = self.session.last.speakers if self.session.last else None
        self.console.print(speakers.legend(self.names, said))

    def _introduce(self) -> None:
        self._note(f"{self.session.label}, {self.session.context:,} tokens of context")
        if self.names:
            self.console.print(speakers.legend(self.names))
        self._note(HINT)

    def _note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


# ---- keys --------------------------------------------------------------------------------------------------


class CommandCompleter(Completer):
    """Completes /commands and what follows them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """The commands, files or names that begin with what stands before the cursor."""
        text = document.text_before_cursor
        if not commands.is_command(text) or "\n" in text:
            return
        name, space, argument = text.partition(" ")
        if not space:
            found = [c for c in commands.COMMANDS.values() if c.name.startswith(name)]
            yield from (Completion(c.name, -len(name), display_meta=c.help) for c in found)
        elif command := commands.COMMANDS.get(name):
            if command.argument == "FILE":
                yield from self._files.get_completions(Document(argument), complete_event)
            choices = (c for c in command.choices(self._session) if c.startswith(argument))
            yield from (Completion(c, -len(argument)) for c in choices)


def _key_bindings() -> KeyBindings:
    """Enter sends unless a backslash ends the line, Alt-Enter begins a new line, Ctrl-C clears before it interrupts."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C sets the event; the second raises KeyboardInterrupt."""
    stopped = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    if threading.current_thread() is not threading.main_thread():  # only the main one hears signals
        yield stopped
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent_keys() -> Iterator[None]:
    """Inside, what is typed is kept for the next prompt, but not shown in the middle of the answer."""
    try:
        import termios
    except ImportError:  # Windows does not show them
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):  # no terminal, or none with a number
        yield
        return
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


# ---- history -----------------------------------------------------------------------------------------------


class _History(FileHistory):
    """A file of messages; one that cannot be written (disk full, bytes that are no text) is no reason to stop."""

    def store_string(self, string: str) -> None:
        """Append a message."""
        with suppress(OSError, UnicodeError):
            super().store_string(string)


def history_file() -> Path | None:
    """Where messages are remembered, in $XDG_STATE_HOME (by default ~/.local/state); for the user alone to read."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        path = state / "octad" / "chat_history"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except (OSError, RuntimeError):  # read-only, or nobody's home
        return None
    return path


def _open_history(path: Path | None) -> History:
    return InMemoryHistory() if path is None else _History(str(path))
