"""A directory that appears whole or not at all: built under a hidden sibling name, renamed when complete.

    with StagedDirectory("mixture") as stage:
        (stage.path / "config.json").write_text(text)
        stage.commit()                                # fsync, rename; without it everything is removed again

The hidden directory is `.{name}.{pid}.incomplete`. A process that is killed leaves it behind; the next one
that wants the same name removes it, once its pid is gone and its lock is free (the lock tells a reused pid
from a living one).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from octad.errors import OutputError


class StagedDirectory:
    """One output directory in the making. Raises OutputError where it exists or cannot be written.

    With `overwrite`, an earlier checkpoint (a directory with a config.json, or an empty one) is replaced at
    commit; a path that is anything else is never removed.
    """

    def __init__(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self.final = Path(directory).resolve()
        if not self.final.name:
            raise OutputError(f"{self.final}: exists; choose another -o")
        self.overwrite = overwrite
        self.path = _sibling(self.final, "incomplete")
        self._lock: int | None = None

    def check(self) -> None:
        """Refuse now what entering would refuse: an output that exists, or a place where no directory can be made."""
        with explained(self.final):
            self._check_output()
            place = next(path for path in self.final.parents if path.exists())
            with tempfile.TemporaryDirectory(prefix=f".{self.final.name}.", dir=place):
                pass

    def __enter__(self) -> Self:
        with explained(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            _clean_up(self.final)
            self._check_output()
            self.path.mkdir()
            self._lock = _lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            shutil.rmtree(self.path, ignore_errors=True)  # after commit there is none

    @property
    def is_open(self) -> bool:
        """True between entering and leaving the `with` block."""
        return self._lock is not None

    def commit(self) -> Path:
        """Make it durable and give it its final name, which is returned."""
        with explained(self.final):
            for path in (*self.path.iterdir(), self.path):
                _fsync(path)
            self._rename()
            _fsync(self.final.parent)
        return self.final

    def _check_output(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            raise OutputError(f"{self.final}: exists; choose another -o or remove it")
        if any(self.final.iterdir()) and not (self.final / "config.json").is_file():
            raise OutputError(
                f"{self.final}: has no config.json, so it is no checkpoint to overwrite; remove it yourself"
            )

    def _rename(self) -> None:
        old = _sibling(self.final, "old")
        if self.overwrite and self.final.exists():
            self.final.rename(old)
        try:
            self.path.rename(self.final)
        except OSError:
            if old.exists():
                old.rename(self.final)
            raise
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def explained(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Turns the operating system's refusals to write a directory into one line for the user."""
    try:
        yield
    except OSError as error:
        parent = directory.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{directory}: the disk is full: {space(parent, needed)}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{directory}: no permission to write in {parent}") from error
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def space(place: Path, needed: int | None = None) -> str:
    """Bytes needed (where known) and free, in words."""
    free = f"{shutil.disk_usage(place).free:,} bytes are free in {place}"
    return free if needed is None else f"{needed:,} bytes are needed, {free}"


def _sibling(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{os.getpid()}.{kind}")


def _clean_up(directory: Path) -> None:
    """Remove what killed runs left; a checkpoint that one had only just moved away is put back."""
    for kind in ("incomplete", "old"):
        for path in directory.parent.glob(f".{glob.escape(directory.name)}.[0-9]*.{kind}"):
            if not _abandoned(path):
                continue
            if kind == "old" and not directory.exists():
                path.rename(directory)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path) -> bool:
    """True where no live process holds it: the pid in its name is gone (or reused by us), and the lock is free."""
    pid = path.name.split(".")[-2]
    if not pid.isdigit() or (int(pid) != os.getpid() and _alive(int(pid))):
        return False
    try:
        os.close(_lock(path))
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _lock(directory: Path) -> int:
    """A descriptor that holds the directory's lock until it is closed or the process dies."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
