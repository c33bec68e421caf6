"""The native library: compiling native.c for the processor's instruction set, or for all of them, and loading it.

    library = load()                    # of the best instruction set that runs here; BuildError where there is none
    library.isa                         # "avx2"
    library.function("linear", [...])   # octad_avx2_linear
    compile_all(path)                   # every instruction set of this kind of processor, for a wheel

A wheel brings the library along. Without, it is compiled at the first use by the machine's C compiler, for the one
instruction set that is chosen, and kept in the user's cache directory under a name that depends on the source and the
compiler; a home directory shared by different machines is safe, since no flag says "native". OCTAD_ISA chooses another
instruction set. The library names no OpenMP runtime: it takes the one that PyTorch has loaded, since two of them would
keep two pools of spinning threads on the same cores. Needs nothing but Python's own library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("native.c")
PACKAGED = Path(__file__).with_name("_native.so")  # in a wheel
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wno-psabi", "-fPIC")
OPENMP = "-fopenmp"
_BUILDING = threading.Lock()  # threads of one process would build under one name
RUNTIMES = ("libgomp", "libiomp5", "libomp")  # OpenMP's, as files are called

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# a tenth quicker than generic code, on AMD's processors, too; in GCC's own order of sums 4 bits lose a fifth
_TUNED = ("-mtune=skylake", "-fno-tree-ter")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
X86: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": (*_AVX2, *_TUNED),
    "avxvnni": (*_AVX2, *_TUNED, "-mavxvnni"),
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
ARM: dict[str, tuple[str, ...]] = {
    "portable": (),
    "neondot": ("-march=armv8.2-a+dotprod",),
    "neoni8mm": ("-march=armv8.2-a+dotprod+i8mm",),
}


class BuildError(Exception):
    """The kernels cannot be had here; the text is the reason. The caller falls back to PyTorch."""


class IsaError(ValueError):
    """OCTAD_ISA names an instruction set that is unknown, or that this processor does not have; the text says so."""


class Library:
    """The loaded library, of which one instruction set's functions are used."""

    def __init__(self, handle: ctypes.CDLL, isa: str) -> None:
        self.handle, self.isa = handle, isa

    def function(self, name: str, arguments: Sequence[Any] = ()) -> Any:
        """The function of this name, told which ctypes it takes; it returns an int."""
        found = getattr(self.handle, f"octad_{self.isa}_{name}")
        found.argtypes = list(arguments)
        return found


def isa_flags() -> dict[str, tuple[str, ...]]:
    """The instruction sets of this kind of processor, the best last, and what the compiler is told for each."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86
    return ARM if machine in ("aarch64", "arm64") else {"portable": ()}


def load(
    cache: Path | None = None,
    flags: Sequence[str] = (),
    *,
    isa: str | None = None,
    openmp: bool = True,
    source: Path = SOURCE,
) -> Library:
    """The kernels of the instruction set `isa`, of OCTAD_ISA, or of the best that runs here; built first if they are not
    in the wheel or the cache. `flags` come after the usual ones. Raises BuildError and IsaError."""
    wanted = isa or os.environ.get("OCTAD_ISA") or None
    if not (cache or flags) and openmp and source == SOURCE and PACKAGED.is_file():
        return _packaged(wanted)
    compiler = _compiler()
    try:
        command = [*compiler, *FLAGS, *flags]
        build = Build(command, source, openmp, cache or cache_directory())
        with _BUILDING:
            return build.library(wanted)
    except (OSError, RuntimeError) as error:  # no home directory is a RuntimeError
        place = "OCTAD_CACHE names a directory that can be written"
        raise BuildError(f"{source.name} cannot be built: {error}; {place}") from error


def isa() -> str | None:
    """The instruction set that the kernels use here; None where they cannot be had. Raises IsaError."""
    try:
        return load().isa
    except BuildError:
        return None


def runnable() -> list[str]:
    """The instruction sets that run here, the best first; none without a compiler and a packaged library."""
    try:
        if PACKAGED.is_file():
            return _runnable(_open(PACKAGED), None)
        return Build([*_compiler(), *FLAGS], SOURCE, True, cache_directory()).runnable(None)
    except (BuildError, OSError, RuntimeError):
        return []


def cache_directory() -> Path:
    """Where all that octad keeps lies: OCTAD_CACHE, else its part of the user's cache directory."""
    if chosen := os.environ.get("OCTAD_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "octad"


def _packaged(wanted: str | None) -> Library:
    try:
        handle = _open(PACKAGED)
    except OSError as error:
        raise BuildError(f"the wheel's {PACKAGED.name} cannot be loaded: {error}") from error
    there = [name for name in _runnable(handle, wanted) if hasattr(handle, f"octad_{name}_features")]
    if not there:
        raise BuildError(f"the wheel's {PACKAGED.name} was built without {wanted}")
    return Library(handle, there[0])


def _runnable(handle: ctypes.CDLL, wanted: str | None) -> list[str]:
    """The instruction sets that run here, the best first, or the wanted one alone. Raises IsaError."""
    names = list(reversed(isa_flags()))
    if wanted is not None and wanted not in names:
        raise IsaError(f"OCTAD_ISA: found {wanted!r}, allowed on this kind of processor: {', '.join(names)}")
    runnable = [name for name in names if handle.octad_runs(name.encode())]
    if wanted is not None and wanted not in runnable:
        raise IsaError(f"OCTAD_ISA: this processor does not run {wanted}; it runs {', '.join(runnable)}")
    return runnable if wanted is None else [wanted]


# ---- compiling ----------------------------------------------------------------------------------------------------


class Build:
    """Libraries of one source and compiler in a directory of the cache: a small one that tells what the processor runs,
    and one for each instruction set that was asked for."""

    def __init__(self, command: Sequence[str], source: Path, openmp: bool, cache: Path) -> None:
        self.command, self.source, self.openmp, self.cache = list(command), source, openmp, cache
        self.directory = cache / f"native-{self._key()}"

    def library(self, wanted: str | None) -> Library:
        """Of the best instruction set that runs here and that the compiler knows."""
        *better, last = self.runnable(wanted)
        for isa in better:
            try:
                return self._library(isa)
            except BuildError as error:  # an old compiler may not know it
                print(f"octad: {error}; trying the next best instruction set", file=sys.stderr)
        return self._library(last)

    def runnable(self, wanted: str | None) -> list[str]:
        """The instruction sets that run here, the best first, or the wanted one alone. Raises IsaError."""
        return _runnable(_open(self._made("runs", ())), wanted)

    def _library(self, isa: str) -> Library:
        return Library(_open(self._made(isa, isa_flags()[isa])), isa)

    def _key(self) -> str:
        sources = [path.read_text(encoding="utf-8") for path in (self.source, *sorted(_headers(self.source)))]
        version = _run([self.command[0], "--version"]).stdout
        parts = [*sources, version, " ".join(self.command), platform.machine(), str(self.openmp)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def _made(self, name: str, flags: Sequence[str]) -> Path:
        """The library of an instruction set ("runs": of none), compiled under a hidden name and then renamed, so that two
        processes cannot disturb each other; what a killed one left goes."""
        library = self.directory / f"{name}.so"
        if library.is_file() and not _not_loadable(library):  # a damaged one is made again
            _tidy(self.cache)
            return library
        self.cache.mkdir(parents=True, exist_ok=True)
        reasons = list[str]()
        # a compiler without OpenMP still gives vector code on one thread
        with _scratch(self.cache / f"{self.directory.name}-{name}") as scratch:
            made = scratch / library.name
            for extra in ([OPENMP], []) if self.openmp else ([],):
                part = scratch / "native.o"
                reason = compile_object(self.command, self.source, name, flags, extra, part)
                reason = reason or link([self.command[0]], [part], made) or _not_loadable(made)
                if not reason:
                    self.directory.mkdir(exist_ok=True)
                    made.replace(library)
                    return library
                reasons.append(reason)
        raise BuildError(f"{self.command[0]} cannot compile {self.source.name}: {reasons[-1]}")


def _tidy(cache: Path) -> None:
    """Remove what builds left that were killed."""
    from octad.staging import tidy

    tidy(cache)


@contextmanager
def _scratch(name: Path) -> Iterator[Path]:
    """A directory for the time of the block, under a hidden name; what killed processes left beside it goes. Raises
    BuildError."""
    from octad.errors import OutputError  # late: setup.py reads this file by itself
    from octad.staging import StagedDirectory

    try:
        with StagedDirectory(name, own_place=True) as stage:
            yield stage.path
    except OutputError as error:
        raise BuildError(str(error)) from error


def compile_object(
    command: Sequence[str], source: Path, isa: str, flags: Sequence[str], extra: Sequence[str], to: Path
) -> str:
    """Compile the source for an instruction set ("runs": what tells them apart). Returns the compiler's first words if it
    refuses, else nothing."""
    chosen = [] if isa == "runs" else [f"-DISA={isa}", *flags]
    return _reason(_run([*command, *chosen, *extra, "-c", "-o", str(to), str(source)], to.parent))


def link(command: Sequence[str], parts: Sequence[Path], to: Path) -> str:
    """Link objects. No OpenMP runtime is named on Linux, see above; elsewhere the compiler adds its own."""
    extra = [] if sys.platform.startswith("linux") else [OPENMP]
    return _reason(
        _run([*command, "-shared", "-o", str(to), *map(str, parts), *extra, "-lm"], parts[0].parent)
    )


def compile_all(to: Path, flags: Sequence[str] = ()) -> dict[str, str]:
    """One library of every instruction set of this kind of processor, at `to`. Returns those that the compiler refused,
    with its reasons. Raises BuildError where nothing comes of it."""
    command, refused = [*_compiler(), *FLAGS, *flags], dict[str, str]()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        wanted = {"runs": (), **isa_flags()}
        parts = {isa: Path(scratch) / f"{isa}.o" for isa in wanted}
        reasons = pool.map(
            lambda isa: compile_object(command, SOURCE, isa, wanted[isa], [OPENMP], parts[isa]), wanted
        )
        refused = {isa: reason for isa, reason in zip(wanted, reasons, strict=True) if reason}
        if "runs" in refused or "portable" in refused:
            raise BuildError(f"{command[0]} cannot compile {SOURCE.name}: {next(iter(refused.values()))}")
        if reason := link(command[:1], [part for part in parts.values() if part.is_file()], to):
            raise BuildError(f"{command[0]} cannot link {to.name}: {reason}")
    return refused


def _compiler() -> list[str]:
    """CC (with its own arguments), else the first that there is."""
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise BuildError(f"CC is no command ({error})") from None
    for name in command[:1] or ("gcc", "cc", "clang"):
        if shutil.which(name):
            return command or [name]
    raise BuildError(
        f"no C compiler found ({' '.join(command) or 'gcc, cc, clang'}); install one, such as gcc"
    )


def _headers(source: Path) -> Iterator[Path]:
    return source.with_name("native_src").glob("*.h")


def _run(command: Sequence[str], scratch: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the compiler. Its temporary files lie in `scratch`, and go with it where the compiler is killed."""
    environment = None if scratch is None else os.environ | {"TMPDIR": str(scratch.absolute())}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, env=environment
    )


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a command failed, or nothing."""
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or ["no reason given"])[0]


# ---- loading ------------------------------------------------------------------------------------------------------


def _open(library: Path) -> ctypes.CDLL:
    _offer_openmp()
    return ctypes.CDLL(str(library))


def _not_loadable(library: Path) -> str:
    """Why a library cannot be loaded, or nothing."""
    try:
        _open(library)
    except OSError as error:
        return str(error)
    return ""


@functools.cache
def _offer_openmp() -> None:
    """Let libraries that are loaded from now on find the OpenMP runtime of this process (PyTorch's own copy in most
    builds, also where PyTorch itself comes later), or else the system's."""
    if not sys.platform.startswith("linux"):
        return
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    files = {Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line}
    if "torch" not in sys.modules:
        files |= set(_of_torch())
    for runtime in RUNTIMES:
        found = sorted(
            file for file in files if file.name.startswith(f"{runtime}.") or f"{runtime}-" in file.name
        )
        found.sort(key=lambda file: "torch" not in file.parts)
        for name in [*map(str, found[:1]), *([] if found else [f"{runtime}.so.1"])]:
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return


def _of_torch() -> Iterator[Path]:
    """The libraries that PyTorch brings along, found without importing it."""
    spec = importlib.util.find_spec("torch")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from Path(place, "lib").glob("*.so*")
        yield from Path(place).with_name("torch.libs").glob("*.so*")
