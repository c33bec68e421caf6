"""What is written appears whole or not at all: built under a hidden name beside its own, put in place when complete.

    with StagedDirectory("mixture") as stage:
        (stage.path / "config.json").write_text(text)
        stage.commit()                                # fsync, rename; without it everything is removed again
    replace_file(Path("report.json"), text)           # one file: written beside it, fsync, rename
    recover(Path("mixture"))                          # before reading: puts back what a killed run had moved away
    refuse_inputs(output, [source.directory])         # an output must not take the place of what it is made of

A directory that takes the place of an older one is exchanged with it in one step, where the system can (Linux);
elsewhere the old one is moved aside first, and comes back when the process dies before the new one is in place. The
hidden names are `.{name}.{pid}.{kind}`. A process that is killed leaves them behind; the next one that wants the same
name removes them, once the pid is gone and the lock is free (the lock tells a reused pid from a living one).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from octad import portable
from octad.errors import OutputError

MARKER = "config.json"  # without it a directory is no checkpoint
LITTER = ("incomplete", "trash", "probe", r"new\d*")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # renameat2(2)


class StagedDirectory:
    """One output directory in the making. Raises OutputError where it exists or cannot be written.

    With `overwrite`, an earlier checkpoint (a directory with a config.json, or an empty one) is replaced at
    commit; a path that is anything else is never removed. `own_place`: nobody but octad writes where it lies, so that
    what killed processes left there under any name is removed too. `adopt`: says of what a killed process left under this
    name whether it can be gone on with; it is then this one's (`adopted`) instead of being removed. `keep`: set it for
    what is not committed to stay, for a later process to adopt.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        own_place: bool = False,
        adopt: Callable[[Path], bool] | None = None,
    ) -> None:
        self.final = _place(directory)
        if not self.final.name:
            raise OutputError(f"{self.final}: exists; choose another -o")
        self.overwrite, self.own_place = overwrite, own_place
        self.path = _sibling(self.final, "incomplete")
        self.adopt, self.adopted, self.keep = adopt, False, False
        self._lock: int | None = None

    def check(self) -> None:
        """Refuse now what entering would refuse: an output that exists, or a place where no directory can be made."""
        with explained(self.final):
            recover(self.final)
            self._check_output()
            place = next(path for path in self.final.parents if path.exists())
            probe = _sibling(place / self.final.name, "probe")
            _clean_up(place, self.final.name, self.adopt or self._is_adopted)
            probe.mkdir()
            probe.rmdir()

    def __enter__(self) -> Self:
        with explained(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            recover(self.final)
            self._take_over()
            _clean_up(self.final.parent, None if self.own_place else self.final.name, self._is_adopted)
            self._check_output()
            if not self.adopted:
                self.path.mkdir()
            self._lock = _lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            if not self.keep:
                shutil.rmtree(self.path, ignore_errors=True)  # after commit there is none

    @property
    def is_open(self) -> bool:
        """True between entering and leaving the `with` block."""
        return self._lock is not None

    def commit(self) -> Path:
        """Make it durable and give it its final name, which is returned."""
        with explained(self.final):
            for path in (*self.path.iterdir(), self.path):
                portable.sync(path)
            self._rename()
            portable.sync(self.final.parent)
        return self.final

    def _check_output(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not self.overwrite:
            model = "; --overwrite replaces an earlier model" if (self.final / MARKER).is_file() else ""
            raise OutputError(f"{self.final}: exists; choose another -o or remove it{model}")
        if any(self.final.iterdir()) and not (self.final / MARKER).is_file():
            raise OutputError(
                f"{self.final}: has no {MARKER}, so it is no checkpoint to overwrite; remove it yourself"
            )

    def _take_over(self) -> None:
        """Make what a killed process has left our own, where it can be gone on with, and nothing stands in the way."""
        if self.adopt is None:
            return
        self._check_output()
        for path in abandoned(self.final):
            if self.adopt(path):
                with contextlib.suppress(FileNotFoundError):  # another process may be as fast
                    path.rename(self.path)
                    self.adopted = True
                    return

    def _is_adopted(self, path: Path) -> bool:
        return self.adopted and path == self.path

    def _rename(self) -> None:
        if not (self.overwrite and self.final.exists()):
            self.path.rename(self.final)
        elif _exchange(self.path, self.final):  # the older one now has the hidden name, and goes with it
            _discard(self.path, self.final)
        else:
            old = _sibling(self.final, "old")
            self.final.rename(old)
            try:
                self.path.rename(self.final)
            except OSError:
                old.rename(self.final)
                raise
            _discard(old, self.final)


def replace_file(path: Path, content: str | bytes, *, own_place: bool = False) -> None:
    """Write one file, whole or not at all; what it replaces keeps its permissions. `own_place` as for StagedDirectory.

    Raises OutputError where it cannot be written; the file is then as it was."""
    with staged_file(path, own_place=own_place) as new:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def staged_file(path: Path, *, own_place: bool = False) -> Iterator[Path]:
    """A hidden file to write inside the block; after it, in one step, the file of that name. Else as replace_file."""
    with explained(path):
        _clean_up(path.parent, None if own_place else path.name)
        new = _sibling(path, f"new{threading.get_ident()}")
        try:
            with open(new, "wb") as lock:
                portable.lock(lock.fileno())
                yield new
                if path.exists() and hasattr(os, "fchmod"):
                    os.fchmod(lock.fileno(), path.stat().st_mode & 0o7777)
                os.fsync(lock.fileno())
                if portable.DIRECTORIES:
                    os.replace(new, path)
            if not portable.DIRECTORIES:  # Windows renames nothing that is open
                os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


def recover(directory: Path) -> None:
    """Put a directory back that a process which was killed between two renames had moved away."""
    with contextlib.suppress(OSError, ValueError):  # whoever goes on from here meets the error, and says it
        if not os.path.lexists(directory):
            found = _leftovers(directory.parent, _hidden(directory.name, ("old",)))
            for path in [path for path, pid in found if _abandoned(path, pid)][:1]:
                path.rename(directory)


def tidy(place: Path, name: str | None = None) -> None:
    """Remove what killed runs left in a place under a name, or, in a directory of octad's own, under any."""
    with contextlib.suppress(OSError):
        _clean_up(place, name)


def refuse_inputs(output: str | os.PathLike[str], inputs: Iterable[Path | None]) -> None:
    """Raises OutputError where the output is, or holds, one of the files and directories that it is made of."""
    final = _place(output)
    for path in inputs:
        if path is not None and path.exists() and final in ((place := path.resolve()), *place.parents):
            what = "is itself" if place == final else f"holds {path},"
            raise OutputError(f"{output}: {what} what is read; choose another -o")


def refuse_unwritable(directory: Path) -> None:
    """Raises OutputError where a directory could not be made, or where it is, not be written into."""
    place = next(path for path in (_place(directory), *_place(directory).parents) if path.exists())
    if not place.is_dir():
        raise OutputError(f"{directory}: {place} is no directory; choose another one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{directory}: no permission to write in {place}")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Inside the block no other process that asks for it changes this file or directory. Raises OutputError at once where
    one does; a file system without locks lets all pass."""
    held = None
    try:
        held = _lock(path)
    except BlockingIOError:
        raise OutputError(f"{path}: another process is changing it; wait until it is done") from None
    except OSError:  # not there, or not ours to read: whoever goes on from here says it
        pass
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def explained(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Turns the operating system's refusals to write a directory or file into one line for the user."""
    try:
        yield
    except OSError as error:
        parent = next((path for path in directory.parents if os.path.exists(path)), directory)
        if error.errno in (errno.EEXIST, errno.ENOTDIR) and not parent.is_dir():
            raise OutputError(f"{directory}: cannot be written: {parent} is no directory") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{directory}: the disk is full: {space(parent, needed)}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"{directory}: no permission to write in {parent}") from error
        if error.errno == errno.ENOTEMPTY:
            raise OutputError(
                f"{directory}: another process has written it meanwhile; choose another -o or remove it"
            ) from error
        if (
            error.errno is None
        ):  # of a library that found less written than it gave, as NumPy does, but not why
            raise OutputError(f"{directory}: cannot be written ({error}): {space(parent, needed)}") from error
        raise OutputError(f"{directory}: cannot be written: {error.strerror or error}") from error


def space(place: Path, needed: int | None = None) -> str:
    """Bytes needed (where known) and free, in words."""
    free = f"{shutil.disk_usage(place).free:,} bytes are free in {place}"
    return free if needed is None else f"{needed:,} bytes are needed, {free}"


def _place(path: str | os.PathLike[str]) -> Path:
    """Where an output lies, links followed. Raises OutputError where they lead nowhere, and for a name that cannot be."""
    try:
        found: Path | None = Path(path).resolve()
    except (
        OSError,
        RuntimeError,
    ):  # what links in a circle were before Python 3.13, which leaves them as they are
        found = None
    except ValueError:
        raise OutputError(f"{os.fspath(path)!r}: no file can have this name; choose another -o") from None
    try:
        str(found).encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"{str(found)!r}: is no UTF-8, as what is written of it has to be; choose another -o"
        ) from None
    with explained(Path(path)):  # a name may be too long
        circle = found is None or found.is_symlink()
    if found is None or circle:
        raise OutputError(f"{os.fspath(path)}: its links lead in a circle; choose another -o")
    return found


# ---- hidden names ------------------------------------------------------------------------------------------


def _sibling(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _hidden(name: str | None, kinds: Iterable[str]) -> re.Pattern[str]:
    """What matches the hidden names of these kinds, of one name or of all; the group is the pid."""
    own = ".+" if name is None else re.escape(name)
    return re.compile(rf"\.{own}\.(\d+)\.(?:{'|'.join(kinds)})", re.DOTALL)


def _leftovers(place: Path, pattern: re.Pattern[str]) -> list[tuple[Path, int]]:
    found = [(path, pattern.fullmatch(path.name)) for path in place.iterdir()]
    return sorted((path, int(match[1])) for path, match in found if match)


def abandoned(final: Path) -> list[Path]:
    """Unfinished outputs of this name that killed processes have left."""
    if not final.parent.is_dir():
        return []
    found = _leftovers(final.parent, _hidden(final.name, ("incomplete",)))
    return [path for path, pid in found if _abandoned(path, pid)]


def bytes_in(directory: Path) -> int:
    """What its files take of the disk."""
    facts = (path.stat() for path in directory.rglob("*") if path.is_file())
    return sum(512 * getattr(found, "st_blocks", -(-found.st_size // 512)) for found in facts)


def _clean_up(place: Path, name: str | None, spared: Callable[[Path], bool] = lambda path: False) -> None:
    """Remove what killed runs left under a name, or under any; an old directory too, once the new one is in place."""
    _remove(place, _hidden(name, LITTER), lambda path: not spared(path))
    _remove(place, _hidden(name, ("old",)), lambda path: os.path.lexists(_visible(path)))


def _visible(path: Path) -> Path:
    return path.with_name(path.name[1:].rsplit(".", 2)[0])


def _remove(
    place: Path, pattern: re.Pattern[str], wanted: Callable[[Path], bool] = lambda path: True
) -> None:
    for path, pid in _leftovers(place, pattern):
        with contextlib.suppress(FileNotFoundError):  # another process may be as fast
            if not (_abandoned(path, pid) and wanted(path)):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _discard(path: Path, final: Path) -> None:
    """Remove a directory that was replaced: first from among the names that are ever put back, then so that it is no
    checkpoint any more, then all of it. What a kill leaves of it is removed by the next run."""
    trash = _sibling(final, "trash")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    with contextlib.suppress(OSError):
        (trash / MARKER).unlink()
    shutil.rmtree(trash, ignore_errors=True)


# ---- what the system offers --------------------------------------------------------------------------------


def _exchange(one: Path, other: Path) -> bool:
    """Give two directories each other's name in one step; False where the system cannot. Raises OSError."""
    call = _renameat2()
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # an old kernel, or a file system without it
        return False
    raise OSError(code, os.strerror(code), str(one))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call


def _abandoned(path: Path, pid: int) -> bool:
    """True where no live process holds it: the pid in its name is gone (or reused by us), and the lock is free."""
    if pid != os.getpid() and portable.is_alive(pid):
        return False
    try:
        os.close(_lock(path))
    except OSError:
        return False
    return True


def _lock(path: Path) -> int:
    """A descriptor that holds the lock of a file or directory until it is closed or the process dies."""
    fd = portable.open_place(path)
    try:
        portable.lock(fd)
    except OSError:
        os.close(fd)
        raise
    return fd
