"""Outputs appear whole or not at all, whatever happens between two calls of the system; nothing is left behind."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octad import staging
from octad.errors import OutputError
from octad.staging import StagedDirectory, explained, recover, refuse_inputs, replace_file


class Killed(BaseException):
    """The process died here: nothing of ours runs any more."""


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that there is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With what Linux offers, and without."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_renameat2", lambda: None)
    return str(request.param)


def write(out: Path, text: str) -> None:
    with StagedDirectory(out, overwrite=True) as stage:
        for name in ("config.json", "weights"):
            (stage.path / name).write_text(text)
        stage.commit()


def contents(out: Path) -> set[str]:
    return {path.read_text() for path in out.iterdir()}


def dies_at(place: int, monkeypatch: pytest.MonkeyPatch, pid: int) -> Callable[[], int]:
    """Let the `place`-th call that changes the file system be the last one, of a process of another number."""
    count = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] >= place:
                raise Killed
            return call(*args, **kwargs)

        return instead

    monkeypatch.setattr(os, "getpid", lambda: pid)
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(staging, "_exchange", counted(staging._exchange))
    return lambda: count[0]


@pytest.mark.parametrize("place", range(1, 14))
def test_killed_before_any_call(
    way: str, place: int, tmp_path: Path, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with monkeypatch.context() as patch:
        dies_at(place, patch, dead)
        with contextlib.suppress(Killed):
            write(out, "new")
    recover(out)
    assert contents(out) in ({"old"}, {"new"})  # one of the two, whole
    write(out, "newer")
    assert contents(out) == {"newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_half_deleted_never_comes_back(way: str, tmp_path: Path, dead: int, monkeypatch: Any) -> None:
    """The old directory is being removed when the process dies; then the new one is removed by hand."""
    out = tmp_path / "out"
    write(out, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead)

        def half(path: Path, ignore_errors: bool = False) -> None:
            if path.exists():
                (path / "weights").unlink()
                raise Killed

        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            write(out, "new")
    assert contents(out) == {"new"}
    left = [path for path in tmp_path.iterdir() if path != out]
    assert not any((path / "config.json").exists() for path in left)
    shutil.rmtree(out)
    recover(out)
    assert not out.exists()


def test_a_name_is_put_back_for_itself_alone(tmp_path: Path, dead: int) -> None:
    for name in ("out", "out.5"):
        old = tmp_path / f".{name}.{dead}.old"
        old.mkdir()
        (old / "config.json").write_text(name)
    recover(tmp_path / "out")
    recover(tmp_path / "out.5")
    assert contents(tmp_path / "out") == {"out"}
    assert contents(tmp_path / "out.5") == {"out.5"}


def test_what_a_living_process_moved_away_is_its_own(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getppid()}.old").mkdir()
    recover(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recovering_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "a" / "b", tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        recover(path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_of_our_own_is_swept(tmp_path: Path, dead: int) -> None:
    litter = [f".{name}.{dead}.{kind}" for name in ("a", "b.c") for kind in ("incomplete", "trash", "new5")]
    kept = [".hidden", f".a.{os.getppid()}.incomplete", f".a.{dead}.other"]
    for name in litter + kept:
        (tmp_path / name).mkdir()
    replace_file(tmp_path / "file", "text", own_place=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "file"])


# ---- one file --------------------------------------------------------------------------------------------


def test_a_file_is_replaced_and_keeps_its_permissions(tmp_path: Path, dead: int) -> None:
    path = tmp_path / "report.json"
    replace_file(path, "\u00e9t\u00e9")
    path.chmod(0o640)
    (tmp_path / f".report.json.{dead}.new7").write_text("litter")
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "report.json"
    replace_file(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OutputError, match="the disk is full"):
            replace_file(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_what_numpy_says_of_a_short_write_is_said_with_the_space_that_there_is(tmp_path: Path) -> None:
    """It has no number of the system's, so a full disk was "16448 requested and 14592 written"."""
    short = r"a\.gguf: cannot be written \(9 requested and 4 written\): .* bytes are free"
    with pytest.raises(OutputError, match=short), explained(tmp_path / "none" / "a.gguf"):
        raise OSError("9 requested and 4 written")
    there = f"no permission to write in {tmp_path}$"  # and not in what is not
    with pytest.raises(OutputError, match=there), explained(tmp_path / "none" / "a.gguf"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


# ---- inputs ----------------------------------------------------------------------------------------------


def test_an_output_that_is_or_holds_an_input(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "models", tmp_path / "link", model / ".." / "base"):
        with pytest.raises(OutputError, match="choose another -o"):
            refuse_inputs(output, [None, tmp_path / "none", model])
    refuse_inputs(model / "int4", [model])
    refuse_inputs(tmp_path / "other", [model])


def test_another_process_was_quicker(tmp_path: Path) -> None:
    with StagedDirectory(tmp_path / "out") as stage:
        (stage.path / "a").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
        with pytest.raises(
            OutputError, match="out: another process has written it meanwhile; choose another -o"
        ):
            stage.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop: its links lead in a circle; choose another -o"):
        StagedDirectory(tmp_path / "loop")
    with pytest.raises(OutputError, match="loop: its links lead in a circle"):
        refuse_inputs(tmp_path / "loop", [tmp_path])
