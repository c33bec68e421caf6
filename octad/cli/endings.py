"""How a command ends where the system has a say: signals, names that cannot be, streams that take no more.

    with ended_by_signals(kept):         # SIGTERM and SIGHUP leave as little behind as Ctrl-C
        check_arguments(sys.argv[1:])
        ...
    complain("one line on stderr")

Whoever stops a command from outside (a scheduler, a container, a terminal that closes) sends SIGTERM or SIGHUP, at which
a process dies without cleaning up. Here they unwind the stack, as Ctrl-C does, and the exit code is the shell's for them:
143 and 129. What handles these signals itself (training, the server) goes on doing so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from octad.errors import RequestError

# Windows has one of them
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# what the system says of a name, a disk or a right, whoever asks: no fault of octad's
OUTSIDE = (
    "ENAMETOOLONG",
    "ELOOP",
    "EACCES",
    "EPERM",
    "EROFS",
    "ENOSPC",
    "EDQUOT",
    "EIO",
    "ESTALE",
    "EMFILE",
    "ENFILE",
)
OUTSIDE_NUMBERS = {getattr(errno, name) for name in OUTSIDE if hasattr(errno, name)}


class _Ended(SystemExit):
    """A signal has ended the command."""


@contextlib.contextmanager
def ended_by_signals(kept: Callable[[], str]) -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise SystemExit, once; then they are as before. `kept` says what is left.

    Only where nobody else has a word: those that are ignored (nohup) stay so, and torchrun ends its own processes."""
    mine = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    if (
        threading.current_thread() is not threading.main_thread()
        or int(os.environ.get("WORLD_SIZE", "1")) > 1
    ):
        mine = []
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        _restore(mine)
        if os.getpid() != process:  # a child that was forked: it dies of it, as it would have
            os.kill(os.getpid(), number)
            return
        raise _Ended(128 + number)

    for number in mine:
        signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        complain(f"ended by {signal.Signals(int(str(ended.code)) - 128).name}; {kept()}")
        raise
    finally:
        _restore(mine)


def _restore(numbers: Sequence[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def check_arguments(arguments: Sequence[str]) -> None:
    """Raises RequestError for one that is no UTF-8: no file or answer that tells of it could hold it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{argument!r}: is no UTF-8; type it in a UTF-8 locale, or rename the file that it names"
            ) from None


def of_the_system(error: Exception) -> str | None:
    """One line, where it is the system's refusal of a file that somebody named."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in OUTSIDE_NUMBERS:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return None


def complain(text: str) -> None:
    """One line on stderr, where there is one that takes it; the exit code says it in any case."""
    with contextlib.suppress(OSError, ValueError):
        print(f"octad: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)


def never_refuse(stream: Any) -> None:
    """A character that a stream's encoding lacks (a bar in a Latin-1 terminal) is written as its escape, and is no
    error; so does Python for stderr."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
