"""What systems other than Linux and macOS do not have, in one place: reading at an offset, locks, directories
that can be opened, memory, who lives.

    read_at(fd, 4096, offset); write_at(fd, data, offset); lock(open_place(path)); sync(path)
    is_alive(pid); memory_bytes()

Everything here has a way without POSIX's own calls, which tests take too by hiding them; on Windows itself it never ran.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading

DIRECTORIES = hasattr(os, "O_DIRECTORY")  # can be opened, and what is open can be renamed: not on Windows
BINARY = getattr(os, "O_BINARY", 0)  # for os.open: on Windows line ends would be changed without it
_SEEKING = threading.Lock()  # of those who share a descriptor's position


def read_at(fd: int, size: int, offset: int) -> bytes:
    """At most `size` bytes from a place of a file."""
    if hasattr(os, "pread"):
        return os.pread(fd, size, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """As many bytes as come at once, into `view`; how many."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = read_at(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def write_at(fd: int, data: bytes | memoryview, offset: int) -> int:
    """As many bytes as go at once, to a place of a file; how many."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _SEEKING:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def lock(fd: int) -> None:
    """Hold a file or directory until the descriptor is closed or the process dies. Raises OSError where another holds it;
    does nothing where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def open_place(path: str | os.PathLike[str]) -> int:
    """To lock a file or directory: its descriptor; of nothing where the system opens no directories. Raises OSError."""
    if not DIRECTORIES and os.path.isdir(path):
        return os.open(os.devnull, os.O_RDONLY)
    return os.open(path, os.O_RDONLY | BINARY)


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file durable, or the names in a directory where the system can. Raises OSError."""
    if not DIRECTORIES and os.path.isdir(path):
        return
    fd = os.open(path, BINARY | (os.O_RDONLY if DIRECTORIES else os.O_RDWR))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_ahead(path: str | os.PathLike[str]) -> None:
    """Have the system read a file into its cache, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def cached_share(fd: int, offset: int, count: int) -> float:
    """How much of a stretch of a file, from 0 to 1, is in the system's cache; 1 where it cannot be asked."""
    names = ("MAP_SHARED", "PROT_READ", "PAGESIZE")
    if sys.maxsize < 1 << 32 or count <= 0 or not all(hasattr(mmap, name) for name in names):
        return 1.0
    library, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    library.mincore.argtypes = [ctypes.c_void_p, size, ctypes.c_void_p]
    library.munmap.argtypes = [ctypes.c_void_p, size]
    before = offset % mmap.PAGESIZE
    length = before + count
    place = library.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset - before)
    if place in (None, ctypes.c_void_p(-1).value):
        return 1.0
    pages = -(-length // mmap.PAGESIZE)
    told = ctypes.create_string_buffer(pages)
    failed = library.mincore(place, length, told)
    library.munmap(place, length)
    return 1.0 if failed else 1 - told.raw[:pages].count(b"\0") / pages


def may_have_gpu() -> bool:
    """Whether there may be a device for PyTorch beside the processor, asked without importing it."""
    if sys.platform == "win32":
        return True
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")))


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs; True where nobody can tell."""
    if sys.platform == "win32":  # there a signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def memory_bytes() -> int:
    """Of the machine; 0 where it cannot be asked."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _windows_memory()


def _windows_memory() -> int:
    """GlobalMemoryStatusEx's second field of 64 bits."""
    library = getattr(ctypes, "windll", None)
    if library is None:
        return 0
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    return int(status[1]) if library.kernel32.GlobalMemoryStatusEx(status) else 0
