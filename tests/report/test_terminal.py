"""What is printed while something moves at the terminal: lines of stdout stand above it, never in it."""

import os
import subprocess
import sys

import pytest

LINES = """
import time
from octad.report import terminal
with terminal.waiting("at work"):
    time.sleep(0.3)
    terminal.say("first")
    terminal.say("second")
"""

pty = pytest.importorskip("pty")


def test_a_line_stands_above_what_moves() -> None:
    """The spinner's line is taken away before each of ours, as a terminal shows it."""
    here, there = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", LINES], stdout=there, stderr=there, env={**os.environ, "TERM": "xterm"}
    )
    os.close(there)
    raw = b""
    while piece := _read(here):
        raw += piece
    assert child.wait() == 0
    assert b"at work" in raw
    for word in ("first", "second"):
        (line,) = (line for line in raw.decode().split("\n") if word in line)
        assert line.rpartition("\x1b[2K")[2].strip("\r") == word, raw
    os.close(here)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def test_a_pipe_has_the_line_alone() -> None:
    """Where stdout is a file, it has the line, whatever moves on stderr."""
    here, there = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", LINES], stdout=subprocess.PIPE, stderr=there, text=True, check=True
    )
    os.close(there)
    os.close(here)
    assert done.stdout == "first\nsecond\n"
