"""Signs of life in a pipe: what is told, and when, by a clock of the test's own; and every command tells."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from tiny_models import TinyCheckpoint

from octad.report.life import FIRST, Life


class Told:
    """A Life at a clock that stands still unless it is moved, looked at twice a second."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[tuple[float, str]]()
        self.life = Life(lambda line: None, lambda: self.now)

    def wait(self, seconds: float) -> list[str]:
        """Nobody says anything for so long; the lines of this while."""
        before = len(self.lines)
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            if line := self.life.due():
                self.lines.append((self.now, line))
                self.life.heard()
        return [line for _, line in self.lines[before:]]


@pytest.fixture
def told() -> Told:
    return Told()


def test_silence_is_broken_and_a_log_of_an_hour_is_no_flood(told: Told) -> None:
    with told.life.doing("reading"):
        assert told.wait(FIRST + 0.5) == [f"reading, for {FIRST:.0f} s now"]
        told.wait(3600)
    times = [when for when, _ in told.lines]
    apart = [b - a for a, b in pairwise(times)]
    assert apart[:3] == [10.0, 20.0, 30.0]
    assert set(apart[3:]) == {30.0}


def test_who_speaks_is_not_interrupted(told: Told) -> None:
    with told.life.doing("reading"):
        for _ in range(20):
            assert told.wait(FIRST - 1) == []
            told.life.heard()


def test_stages_and_what_is_left_of_them(told: Told) -> None:
    with told.life.doing("at work"), told.life.doing(""):
        told.life.reached("all of it", 0.0)
        told.life.reached("writing", 0.5)
        told.now = 2.0
        told.life.reached("writing", 0.75)
        assert told.wait(5) == ["all of it, 0 %; writing, 75 %, about 4 s left"]
        told.life.reached("writing", 1.0)
        assert told.wait(12) == ["all of it, 0 %"]
    with told.life.doing("at work"), told.life.doing(""):
        told.life.reached("writing", 1.0)
        assert told.wait(25) == ["writing, 100 %"]


def test_what_moves_or_waits_for_a_person_or_tells_itself_is_left_alone(told: Told) -> None:
    with told.life.doing("at work"):
        with told.life.doing("typing", shown=True):
            assert told.wait(100) == []
        with told.life.doing(lambda: ""):
            assert told.wait(100) == []
        with told.life.doing(lambda: "loading"):
            assert told.wait(5) == ["loading"]
        assert told.wait(20) == ["at work, for 4 min now"]
    assert told.wait(100) == []


def test_a_command_that_takes_long_tells_in_a_pipe(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    command = [sys.executable, "-m", "octad", "inspect", str(tiny_checkpoint("llama"))]
    environment = os.environ | {"OCTAD_PULSE": "0.05"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("octad: inspect is at work") for line in lines)
    quiet = subprocess.run([*command, "-q"], capture_output=True, text=True, env=environment, check=True)
    assert (quiet.stderr, quiet.stdout) == ("", done.stdout)
