"""Calibration states in a file are those in memory, bit for bit, and nothing of the file stays."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from members import full_member, make_base, make_recipe, text_file

from octad.combine import states
from octad.combine.build import combine
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.preflight import preflight
from octad.combine.states import States
from octad.errors import OutputError
from octad.text.windows import Window


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory, empty; everything is spilled."""
    (tmp_path / "spill").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spill"))
    monkeypatch.setattr(states, "IN_MEMORY", 0)
    torch.set_num_threads(1)
    return tmp_path / "spill"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_list_of_tensors(place: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(3, 5, 8), (1, 2, 8), (4, 1, 8)]
    first, second = ([torch.randn(shape).to(dtype) for shape in shapes] for _ in range(2))
    with States(sum(t.nbytes for t in first)) as kept:
        assert [kept.append(t) for t in first] == [0, 1, 2]
        assert all(torch.equal(kept[i], t) for i, t in enumerate(first))
        kept[1] = second[1].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(kept[1], second[1])
        kept[0] = second[0]
        assert [torch.equal(kept[i], t) for i, t in enumerate((second[0], second[1], first[2]))] == [True] * 3
    assert list(place.iterdir()) == []


def test_what_is_kept_in_memory_is_no_alias_of_what_is_read(place: Path) -> None:
    with States(32) as kept:
        kept.append(torch.ones(8))
        kept[0].add_(1)
        assert torch.equal(kept[0], torch.ones(8))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gate_inputs_are_the_same(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = make_base(tmp_path / "base", family)
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    source = preflight(make_recipe(base, entries, router={"method": "random"})).source()
    torch.manual_seed(1)
    windows = [Window(tuple(torch.randint(256, (n,)).tolist()), 0, 0) for n in (50, 7, 33)]
    runs = [Run(0, 0, windows), Run(1, 1, windows[1:]), Run(1, 0, windows)]
    spilled = list(gate_inputs(source, runs, torch.float32))
    monkeypatch.setattr(states, "IN_MEMORY", 1 << 30)
    for found, expected in zip(spilled, gate_inputs(source, runs, torch.float32), strict=True):
        assert found[:2] == expected[:2]
        assert torch.equal(found[2], expected[2])


def open_files() -> list[str]:
    """What this process has open, files without a name too."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the directory's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks Linux which files are open")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, None])
def test_nothing_stays(tmp_path: Path, place: Path, kind: type[BaseException] | None) -> None:
    base = make_base(tmp_path / "base")
    entries = [{"name": f"m{e}", "model": "base", "data": str(text_file(tmp_path, e))} for e in range(2)]
    opened: list[int] = []

    def stop(stage: str, done: float) -> None:
        if stage == "calibrating":
            opened.append(sum(str(place) in file for file in open_files()))
            if kind is not None and done > 0.4:
                raise kind

    plan = preflight(make_recipe(base, entries))
    if kind is None:
        combine(plan, tmp_path / "m", progress=stop)
    else:
        with pytest.raises(kind):
            combine(plan, tmp_path / "m", progress=stop)
    assert set(opened) == {1}  # there was a file
    assert list(place.iterdir()) == []


def test_no_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=f"{place}: 1,000 bytes .*No space left.*TMPDIR"):
        States(1000)
