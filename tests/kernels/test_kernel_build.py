"""Compiling the kernels where things go wrong: no compiler, a broken one, several processes, a source that changed."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octad.kernels import compile as build
from octad.kernels.compile import BuildError, IsaError, compile_all, isa, isa_flags, load, runnable
from octad.kernels.native import NativeKernels

QUICK = ["-O0"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the kernels' source, to be changed."""
    copy = tmp_path / "source"
    copy.mkdir()
    shutil.copy(build.SOURCE, copy)
    shutil.copytree(build.SOURCE.with_name("native_src"), copy / "native_src")
    return copy / build.SOURCE.name


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C compiler found .*install one, such as gcc"):
        load(tmp_path)
    monkeypatch.setenv("CC", "no-such-compiler -O9")
    with pytest.raises(BuildError, match=r"no C compiler found .no-such-compiler -O9"):
        load(tmp_path)
    monkeypatch.setenv("CC", "gcc 'unclosed")
    with pytest.raises(BuildError, match=r"CC is no command \(No closing quotation\)"):
        load(tmp_path)
    assert isa() is None or build.PACKAGED.is_file()


def test_a_compiler_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first words are the reason, and nothing stays behind."""
    monkeypatch.setenv(
        "CC", str(script(tmp_path / "cc", "echo 'cc: it is Sunday' >&2; echo more >&2; exit 1"))
    )
    with pytest.raises(BuildError, match=r"cc cannot compile native\.c: cc: it is Sunday$"):
        load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_makes_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rubbish = """while [ $# -gt 0 ]; do [ "$1" = -o ] && echo rubbish > "$2"; shift; done"""
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", rubbish)))
    with pytest.raises(BuildError, match="cannot compile"):
        load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "cc", "")
    path.write_bytes(b"\x7fELF nonsense")
    monkeypatch.setenv("CC", str(path))
    with pytest.raises(BuildError):
        load(tmp_path / "cache")


def test_a_compiler_with_arguments_and_without_openmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.which("gcc") or shutil.which("cc")
    picky = 'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done; exec %s "$@"'
    monkeypatch.setenv("CC", f"{script(tmp_path / 'cc', picky % real)} -DUNUSED=1")
    kernels = NativeKernels(load(tmp_path / "cache", QUICK))
    assert not kernels.features & 4
    weight = torch.ones(1, 8)
    torch.testing.assert_close(kernels.rms_norm(2 * weight, weight[0], 0.0), weight)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be built"):
        load(tmp_path / "file" / "cache", QUICK)
    monkeypatch.setenv("OCTAD_CACHE", str(tmp_path / "chosen"))
    assert build.cache_directory() == tmp_path / "chosen"
    monkeypatch.delenv("OCTAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_directory() == tmp_path / "octad"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(BuildError, match="home directory"):
        load()


def test_a_changed_source_is_built_anew(tmp_path: Path, source: Path) -> None:
    cache = tmp_path / "cache"
    before = NativeKernels(load(cache, QUICK, source=source)).features
    load(cache, QUICK, source=source)
    assert len(list(cache.iterdir())) == 1
    part = source.parent / "native_src" / "parts.h"
    part.write_text(part.read_text() + "\n#define CHANGED 64\n")
    source.write_text(source.read_text().replace("return features;", "return features | CHANGED;"))
    assert NativeKernels(load(cache, QUICK, source=source)).features == before | 64
    assert len(list(cache.iterdir())) == 2
    load(cache, [*QUICK, "-DOTHER=1"], source=source)
    load(cache, QUICK, openmp=False, source=source)
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_library_in_the_cache_is_built_again(tmp_path: Path) -> None:
    made = build.Build(["gcc", *build.FLAGS, *QUICK], build.SOURCE, True, tmp_path / "cache")
    made.directory.mkdir(parents=True)
    (made.directory / "runs.so").write_bytes(b"cut short")
    assert made.runnable(None)[-1] == "portable"


def test_a_cache_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(
        BuildError, match=r"cannot be built: .*; OCTAD_CACHE names a directory that can be written"
    ):
        load(tmp_path / "cache", QUICK)


def test_an_error_in_the_source_is_its_own_reason(tmp_path: Path, source: Path) -> None:
    source.write_text("#error out of order\n" + source.read_text())
    with pytest.raises(BuildError, match=r"native.c:1:2: error: #error out of order"):
        load(tmp_path / "cache", QUICK, source=source)


def test_processes_that_build_at_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from octad.kernels.compile import load;"
        f"print(load(Path({str(tmp_path / 'cache')!r}), {QUICK!r}).function('features')())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {run.communicate(timeout=100)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(answers) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_every_path_of_this_kind_of_processor_compiles(tmp_path: Path) -> None:
    """In one library, as a wheel has it; what the processor does not run included."""
    refused = compile_all(tmp_path / "all.so", QUICK)
    assert not refused
    code = f"""
import ctypes, torch
from octad.kernels import compile as build
build.PACKAGED = build.Path({str(tmp_path / "all.so")!r})
library = build.load()
print(library.isa, *[isa for isa in build.isa_flags() if hasattr(library.handle, f"octad_{{isa}}_layers")])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    best, *names = run.stdout.split()
    assert names == list(isa_flags())
    assert best == runnable()[0]


def test_the_chosen_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load().isa == runnable()[0] == isa()
    monkeypatch.setenv("OCTAD_ISA", "portable")
    assert load().isa == "portable" == isa()
    monkeypatch.setenv("OCTAD_ISA", "avx9")
    with pytest.raises(
        IsaError, match=r"^OCTAD_ISA: found 'avx9', allowed on this kind of processor: .*portable$"
    ):
        load()
    if unknown := [name for name in isa_flags() if name not in runnable()]:
        monkeypatch.setenv("OCTAD_ISA", unknown[0])
        with pytest.raises(IsaError, match=rf"does not run {unknown[0]}; it runs .*portable$"):
            load()


def test_a_compiler_that_does_not_know_the_best_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next best, in one line."""
    if len(runnable()) < 2:
        pytest.skip("there is one only")
    best, second = runnable()[:2]
    old = f"""for a in "$@"; do [ "$a" = -DISA={best} ] && echo "cc: too new" >&2 && exit 1; done; exec gcc "$@\""""
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", old)))
    assert load(tmp_path / "cache", QUICK).isa == second
    assert capsys.readouterr().err.endswith("native.c: cc: too new; trying the next best instruction set\n")


def test_what_a_killed_build_left_is_removed(tmp_path: Path) -> None:
    """A build that was killed leaves its hidden directory; the next one in the same cache removes it."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    left = tmp_path / f".native-0-runs.{gone.pid}.incomplete"
    left.mkdir()
    (left / "native.o").write_bytes(b"x")
    load(tmp_path, QUICK, isa="portable")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_compilers_own_files_lie_in_the_builds_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that is killed leaves its temporary files; they go with the build's directory."""
    told = tmp_path / "told"
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", f'echo "$TMPDIR" >> {told}; exit 1')))
    with pytest.raises(BuildError):
        load(tmp_path / "cache")
    version, *compiling = told.read_text().split()
    assert version == "/elsewhere"
    assert compiling
    assert all(Path(place).parent == tmp_path / "cache" and not Path(place).exists() for place in compiling)
