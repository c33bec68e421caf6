"""Runs programs that nobody has read: one process each, with nothing of the machine but its own scratch directory.

    sandbox = Sandbox()                      # raises SandboxError where the kernel cannot confine
    sandbox.run("assert 1 + 1 == 2").passed

What holds is told, not assumed: `sandbox.walls` is what the far side (confine.py) reports of this machine. A program
passes when it ran to its end: only then a token of that run comes back, over a descriptor of its own. Leaving early with
exit code 0 is therefore no pass. Whatever is not over in time is killed with its process group.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from octad.errors import SandboxError

CONFINE = Path(__file__).with_name("confine.py")
# No site packages, no user site, no script directory on the path, no .pyc files. Not -I: it would ignore the hash seed,
# and the environment is ours anyway.
PYTHON = (sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8")
PREFIX, SETTLED = "octad-sandbox-", 10.0  # seconds after which a directory that is in use is locked
MESSAGE = 1 << 16  # bytes of an outcome at most, which is what a pipe holds


@dataclass(frozen=True)
class Limits:
    """What one program may take. `cpu_seconds` is HumanEval's own timeout; the clock is laxer, for a busy machine."""

    cpu_seconds: int = 3
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    scratch_bytes: int = 16 << 20
    open_files: int = 32


@dataclass(frozen=True)
class Walls:
    """What holds back each: "landlock 7", "namespace + seccomp", ...; "" where only Python's audit hook does."""

    files: str
    network: str
    processes: str

    @property
    def strong(self) -> bool:
        """Whether the kernel enforces all of them."""
        return bool(self.files and self.network and self.processes)

    def __str__(self) -> str:
        parts = {"files": self.files, "network": self.network, "processes": self.processes}
        return ", ".join(f"{name}: {wall or 'audit hook only'}" for name, wall in parts.items())


@dataclass(frozen=True)
class Outcome:
    """Whether the program ran to its end, and if not why: "AssertionError", "time", "killed by SIGSEGV", ..."""

    passed: bool
    reason: str = ""


class Sandbox:
    """Runs programs behind the walls that this machine has. With `weak` also where the kernel does not enforce them;
    kernel=False leaves the kernel's walls out, as on a machine without them."""

    def __init__(self, limits: Limits | None = None, *, weak: bool = False, kernel: bool = True) -> None:
        self.limits, self.weak, self.kernel = limits or Limits(), weak, kernel
        if os.name != "posix":
            raise SandboxError("programs cannot be confined on this system; run code tasks on Linux")
        if not self.walls.strong and not weak:
            raise SandboxError(
                f"this kernel cannot confine programs ({self.walls}); run code tasks on Linux 6.2 or newer, or accept"
                " the weaker wall with --weak-sandbox"
            )

    @cached_property
    def walls(self) -> Walls:
        """What holds here, found by running a program of nothing."""
        _remove_orphans()
        message, code = self._process("pass")
        if message is None:
            raise SandboxError(f"the sandbox does not start (exit code {code}); is {sys.executable} whole?")
        return message.held

    def run(self, program: str) -> Outcome:
        """One program, to its end or the limits'."""
        message, code = self._process(program)
        if message is None:
            return Outcome(False, _reason(code))
        return Outcome(message.outcome == "passed", message.reason)

    def run_all(
        self, programs: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> list[Outcome]:
        """Many, one on each core at a time; `progress` gets how many are done."""
        outcomes = []
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for done, outcome in enumerate(pool.map(self.run, programs), 1):
                outcomes.append(outcome)
                progress(done)
        return outcomes

    def _process(self, program: str) -> tuple[_Message | None, int | None]:
        """The outcome that bears this run's token (None: there was none) and the exit code (None: out of time)."""
        token = secrets.token_hex(16)
        with _scratch() as scratch:
            settings = asdict(self.limits) | {"weak": self.weak, "kernel": self.kernel, "parent": os.getpid()}
            job = {"program": program, "token": token, "scratch": scratch} | settings
            receive, send = os.pipe()
            try:
                code = self._finish(json.dumps(job).encode(), send, scratch)
                return _receive(receive, token), code
            finally:
                os.close(receive)

    def _finish(self, job: bytes, send: int, scratch: str) -> int | None:
        """Start the far side, hand it the job, wait; closes `send`."""
        environment = {"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        try:
            process = subprocess.Popen(
                [*PYTHON, str(CONFINE), str(send)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(send,),
                env=environment,
                cwd=scratch,
                start_new_session=True,
            )
        finally:
            os.close(send)
        try:
            process.communicate(job, timeout=self.limits.wall_seconds)
            return process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, also what a finished program left behind."""
    with suppress(ProcessLookupError, PermissionError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class _Message:
    """What the far side says at its end."""

    outcome: str
    reason: str
    held: Walls


def _receive(pipe: int, token: str) -> _Message | None:
    """What the far side wrote, if it is that; anything else is the program's own and counts for nothing. Never waits: a
    process that escaped may hold the other end open."""
    os.set_blocking(pipe, False)
    try:
        found = json.loads(os.read(pipe, MESSAGE))
        if not secrets.compare_digest(str(found["token"]).encode(errors="replace"), token.encode()):
            return None
        return _Message(str(found["outcome"]), str(found["reason"]), Walls(**found["held"]))
    except (BlockingIOError, ValueError, RecursionError, KeyError, TypeError):
        return None


@contextmanager
def _scratch() -> Iterator[str]:
    """A directory for one program. The lock on it says that it is in use: the system lets go of it whatever happens."""
    import fcntl

    with TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as scratch:
        held = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)
            yield scratch
        finally:
            os.close(held)


def _remove_orphans() -> None:
    """Directories of runs that were killed: old enough to be locked, and nobody's."""
    import fcntl

    for path in Path(gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < SETTLED:
                continue
            held = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


def _reason(code: int | None) -> str:
    if code is None or code == -signal.SIGXCPU:
        return "time"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"left early with exit code {code}"
