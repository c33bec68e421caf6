"""The conversation at a terminal: keys through prompt_toolkit's own pipe, and the whole program in a pseudo-terminal."""

# ruff: noqa: F401, F811 (fixtures are imported)
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from tiny_chat import llm, mixture, untaught

from octad.chat.screen import CommandCompleter, Screen, history_file
from octad.chat.session import Session
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams

ALT_ENTER, CTRL_C, CTRL_D, ENTER = "\x1b\r", "\x03", "\x04", "\r"
Talk = Callable[..., str]


@pytest.fixture
def session(llm: LLM) -> Session:
    return Session(llm, SamplingParams(temperature=0, max_tokens=8), label="tiny")


@pytest.fixture
def talk(session: Session, tmp_path: Path) -> Talk:
    """talk("Hi\\r", ...) types all this, and returns what was printed."""

    def typed(*keys: str, colour: bool = False) -> str:
        file = io.StringIO()
        system = "standard" if colour else None
        console = Console(file=file, force_terminal=colour, color_system=system, width=100)
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text("".join(keys))
            Screen(session, console, tmp_path / "history").run()
        return file.getvalue()

    return typed


def test_an_answer_and_a_line_about_it(session: Session, talk: Talk) -> None:
    printed = talk("Hi" + ENTER, CTRL_D)
    assert [turn.question for turn in session.turns] == ["Hi"]
    assert "8 tokens · " in printed
    assert f"prompt {len('<user>Hi?<assistant>')}, 0 cached" in printed
    assert "tiny, 384 tokens of context" in printed


def test_several_lines(session: Session, talk: Talk) -> None:
    talk("one\\" + ENTER + "two" + ALT_ENTER + "three" + ENTER, "//x" + ENTER, "/quit" + ENTER)
    assert [turn.question for turn in session.turns] == ["one\ntwo\nthree", "/x"]


def test_ctrl_c_clears_then_hints_and_never_leaves(session: Session, talk: Talk) -> None:
    printed = talk("unwanted" + CTRL_C, CTRL_C, CTRL_C, "Hi" + ENTER, CTRL_D)
    assert printed.count("Ctrl-D leaves") == 3  # the welcome and two hints
    assert [turn.question for turn in session.turns] == ["Hi"]


def test_mistakes_are_one_line_and_the_conversation_goes_on(session: Session, talk: Talk) -> None:
    printed = talk("/hlep" + ENTER, "x" * 400 + ENTER, ENTER, "Hi" + ENTER, CTRL_D)
    assert "/hlep: no such command; did you mean /help?" in printed
    assert "the model's context is 384; shorten it" in printed
    assert [turn.question for turn in session.turns] == ["Hi"]


def test_words_in_colour_and_their_legend(session: Session, talk: Talk) -> None:
    printed = talk("/experts on" + ENTER, "Hi" + ENTER, CTRL_D, colour=True)
    assert session.last is not None
    codes = {"general": "\x1b[39m", "french": "\x1b[32m", "maths": "\x1b[36m"}
    for expert, name in enumerate(codes):
        if share := session.last.speakers[expert]:
            assert f"{codes[name]}{name} {100 * share / 8:.0f} %\x1b[0m" in printed
            assert (
                printed.count(codes[name]) > 3
            )  # welcome, the command's legend, the answer's, and its words
    assert session.last.speakers.total() == 8


def test_commands_that_end_in_an_answer(session: Session, talk: Talk) -> None:
    session.params = replace(
        session.params, min_tokens=8
    )  # at this temperature an answer may end early by chance
    printed = talk("/set temperature 1.5" + ENTER, "Hi" + ENTER, "/retry" + ENTER, "/retry" + ENTER, CTRL_D)
    assert printed.count("8 tokens · ") == 3
    assert len(session.turns) == 1


def interrupted_after(tokens: int, llm: LLM, times: int = 1) -> None:
    """From here on, the interrupt signal comes while the model makes that token, on the engine's thread: the screen has
    shown what came before, and takes note of each signal before the next one."""
    run, count = llm.engine.runner.run, 0

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        for _ in range(times if count == tokens else 0):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return run(*arguments)

    llm.engine.runner.run = counted  # type: ignore[method-assign]


def test_ctrl_c_stops_the_answer_between_two_tokens(session: Session, talk: Talk) -> None:
    session.params = SamplingParams(temperature=0, max_tokens=8, logit_bias={65: 100.0})
    interrupted_after(3, session.llm)
    printed = talk("Hi" + ENTER, "And" + ENTER, CTRL_D)
    assert [turn.answer for turn in session.turns] == ["bbb", "b" * 8]
    assert "3 tokens · " in printed
    assert " · stopped" in printed


def test_a_second_ctrl_c_does_not_wait(session: Session, talk: Talk) -> None:
    interrupted_after(1, session.llm, times=2)
    printed = talk("Hi" + ENTER, "And" + ENTER, CTRL_D)
    assert "interrupted" in printed
    assert "nothing was said; the question is taken back" in printed
    assert [turn.question for turn in session.turns] == ["And"]


def test_messages_are_remembered(talk: Talk, session: Session, tmp_path: Path) -> None:
    talk("first" + ENTER, CTRL_D)
    talk("\x1b[A" + ENTER, CTRL_D)  # the key up
    assert [turn.question for turn in session.turns] == ["first", "first"]


def test_history_lies_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file()
    assert path == tmp_path / "octad" / "chat_history"
    assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_file() is None


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/re", ["/reset", "/retry"]),
        ("/only f", ["french"]),
        ("/experts ", ["on", "off"]),
        ("/set t", ["temperature", "top_p", "top_k"]),
        ("Hi", []),
        ("//re", []),
        ("/nothing x", []),
    ],
)
def test_completion(line: str, expected: list[str], session: Session) -> None:
    found = CommandCompleter(session).get_completions(Document(line), CompleteEvent())
    assert [completion.text for completion in found] == expected


def test_completion_of_files(session: Session, tmp_path: Path) -> None:
    (tmp_path / "talk.json").touch()
    found = CommandCompleter(session).get_completions(Document(f"/load {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in found] == ["lk.json"]


class Program:
    """octad in a pseudo-terminal."""

    def __init__(self, *arguments: object, state: Path) -> None:
        self.terminal, own = pty.openpty()
        command = [sys.executable, "-m", "octad.cli", *map(str, arguments)]
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=own,
            stdout=own,
            stderr=own,
            env=environment,
            start_new_session=True,
            preexec_fn=_control,
        )
        os.close(own)
        self.printed = ""

    def wait_for(self, text: str, count: int = 1, keys: str = "") -> None:
        """Until it is printed `count` times; `keys` are typed whenever the program is silent for a second, since what is
        typed between two prompts may be lost."""
        end = time.monotonic() + 100
        while self.printed.count(text) < count:
            assert time.monotonic() < end, self.printed
            if not select.select([self.terminal], [], [], 1.0)[0]:
                self.type(keys)
                continue
            try:
                new = os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:  # the other side has closed
                raise AssertionError(self.printed) from None
            self.printed += new
            if "\x1b[6n" in new:  # a terminal answers where its cursor is
                self.type("\x1b[1;1R")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())


def _control() -> None:
    """Make the pseudo-terminal the one whose Ctrl-C is heard."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_the_whole_program_in_a_terminal(mixture: Path, tmp_path: Path) -> None:
    program = Program("chat", mixture, "--max-tokens", 300, "--temperature", 0, state=tmp_path)
    program.wait_for("Ctrl-D leaves")
    program.type("/experts on\r")
    program.wait_for("each word in the colour")
    program.type("Hi\r")
    program.wait_for("tokens/s")
    program.wait_for("Ctrl-D leaves", 2, keys="\x03")
    program.type("/quit\r")
    assert program.process.wait(60) == 0
    for code in ("\x1b[39mgeneral", "\x1b[32mfrench", "\x1b[36mmaths"):
        assert code in program.printed
    assert "+Hi" in (tmp_path / "octad" / "chat_history").read_text()
