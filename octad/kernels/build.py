"""Compile native.c with the C compiler of the machine, once, and load it.

    library = load()        # a ctypes library; BuildError where it cannot be made here

The result is kept in the user's cache directory under a name that depends on the source, the compiler and the CPU, so a
home directory shared by different machines is safe. It is linked against the OpenMP runtime that PyTorch has loaded:
two runtimes would keep two pools of spinning threads on the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    *("-Wno-psabi", "-shared", "-fPIC"),
)
OPENMP = "-fopenmp"


class BuildError(Exception):
    """The kernels cannot be compiled here; the text is the reason. The caller falls back to PyTorch."""


def load(
    cache: Path | None = None, flags: Sequence[str] = (), *, openmp: bool = True, source: Path = SOURCE
) -> ctypes.CDLL:
    """The compiled kernels, built first if they are not in the cache; `flags` come after FLAGS. Raises BuildError."""
    compiler = _compiler()
    try:
        command = [*compiler, *FLAGS, *flags]
        library = (cache or cache_directory()) / f"native-{_key(command, source, openmp)}.so"
        if not library.is_file():
            _compile(command, source, library, openmp)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError) as error:  # no home directory is a RuntimeError
        raise BuildError(f"{source.name} cannot be built: {error}") from error


def cache_directory() -> Path:
    """OCTAD_CACHE, else the user's cache directory."""
    if chosen := os.environ.get("OCTAD_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "octad"


def _compiler() -> list[str]:
    """CC (with its own arguments), else the first that there is."""
    command = shlex.split(os.environ.get("CC", ""))
    for name in command[:1] or ("gcc", "cc", "clang"):
        if shutil.which(name):
            return command or [name]
    raise BuildError(
        f"no C compiler found ({' '.join(command) or 'gcc, cc, clang'}); install one, such as gcc"
    )


def _key(command: Sequence[str], source: Path, openmp: bool) -> str:
    sources = [path.read_text() for path in (source, *sorted(source.with_name("native_src").glob("*.h")))]
    version = _run([command[0], "--version"]).stdout
    parts = [*sources, version, " ".join(command), _cpu(), str(_loaded_openmp() if openmp else "no threads")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on: the CPU's model and instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in info.read_text().splitlines() if line.startswith(wanted)}
    return "\n".join(sorted(lines))


def _loaded_openmp() -> Path | None:
    """The libgomp in this process (PyTorch's own copy in most builds), where the system tells."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    found = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    return Path(min(found)) if found else None


def _compile(command: Sequence[str], source: Path, library: Path, openmp: bool) -> None:
    """Into a temporary file beside the library, then renamed, so that two processes cannot disturb each other."""
    library.parent.mkdir(parents=True, exist_ok=True)
    runtime, reasons = _loaded_openmp(), list[str]()
    # a compiler without OpenMP, or with one that PyTorch's cannot serve, still gives vector code on one thread
    attempts = [[OPENMP, *([str(runtime)] if runtime else [])], []]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        for extra in attempts if openmp else [[]]:
            done = _run([*command, "-o", str(made), str(source), *extra, "-lm"])
            if done.returncode == 0 and not (reason := _not_loadable(made)):
                made.replace(library)
                return
            reasons += [reason] if done.returncode == 0 else done.stderr.strip().splitlines()[:1]
    raise BuildError(
        f"{command[0]} cannot compile {source.name}: {reasons[-1] if reasons else 'no reason given'}"
    )


def _not_loadable(library: Path) -> str:
    """Why a library cannot be loaded, or nothing."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
