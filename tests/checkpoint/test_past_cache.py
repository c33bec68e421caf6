"""What goes past the system's cache is what goes through it, wherever pieces begin, and where the system cannot."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octad import portable
from octad.checkpoint import extent as extents
from octad.checkpoint import past_cache
from octad.checkpoint.extent import Extent, same_bytes
from octad.checkpoint.hf import SINGLE
from octad.checkpoint.row_writer import RowWriter
from octad.checkpoint.shard import read_header
from octad.checkpoint.source import TensorInfo
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import CheckpointError

SIZE, PIECE = 40_000, 1 << 14


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is too large for the cache; pieces of few pages."""
    monkeypatch.setattr(past_cache, "ALIGN", 4096)
    monkeypatch.setattr(extents, "ALIGN", 4096)
    monkeypatch.setattr(past_cache, "CHUNK", PIECE)
    monkeypatch.setattr(extents, "CHUNK", PIECE)
    monkeypatch.setattr(past_cache, "PART_OF_MEMORY", 1 << 60)


@pytest.fixture
def passes(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"x")
    file = past_cache.open_past_cache(tmp_path / "probe", os.O_RDONLY)
    (tmp_path / "probe").unlink()
    if file is None:
        pytest.skip("this file system has no way past its cache")
    os.close(file)


def forget(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("start", [0, 8, 4096, 5003])
def test_a_stretch_from_file_to_file(passes: None, tmp_path: Path, start: int, cached: bool) -> None:
    data = random.Random(start).randbytes(start + SIZE + 5)
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(data)
    target.write_bytes(b"." * (9 * 4096 + 7))
    if not cached:
        forget(source)
    with source.open("rb") as file:
        share = portable.cached_share(file.fileno(), start, SIZE)
        assert share == (1 if cached else pytest.approx(0, abs=0.2))
        out = past_cache.open_past_cache(target, os.O_WRONLY)
        total = SIZE // 4096 * 4096 - 4096
        assert past_cache.copy_past_cache(source, file.fileno(), start, out, 4096, total) == total
        short = past_cache.copy_past_cache(source, file.fileno(), start + 8192, out, 4096, 12 * 4096)
        assert short in range(0, SIZE, 4096)  # the source ends before: whoever goes on from here says it
        past_cache.copy_past_cache(source, file.fileno(), start, out, 4096, total)
        os.close(out)
    wanted = b"." * 4096 + data[start : start + total]
    assert target.read_bytes()[: len(wanted)] == wanted


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Of sizes that are no whole number of pages, small ones among them."""
    torch.manual_seed(0)
    found = {f"t{n}": torch.randn(20_000 * (n % 3) + 1001 + n) for n in range(7)}
    save_file(found, directory / SINGLE)
    forget(directory / SINGLE)
    return found


class Held:
    """As much of a source as `copy_all` asks for."""

    def __init__(self, path: Path) -> None:
        self.extents = read_header(path)

    def extent(self, name: str) -> Extent:
        return self.extents[name]


def refused(path: Any, flags: int) -> None:
    return None


def write_fails(monkeypatch: pytest.MonkeyPatch, unless: int) -> None:
    """As where a file system opens a file so, and takes no such write: then the system copies, without this call."""
    real = os.pwrite

    def pwrite(file: int, data: Any, position: int) -> int:
        if len(data) >= unless:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("how", ["past", "not opened", "not written"])
@pytest.mark.parametrize("shard_bytes", [100_000, 1e9])
def test_a_checkpoint_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, shard_bytes: float
) -> None:
    wanted = tensors(tmp_path)
    source = Held(tmp_path / SINGLE)
    if how == "not opened":
        monkeypatch.setattr("octad.checkpoint.writer.open_past_cache", refused)
    if how == "not written":
        write_fails(monkeypatch, unless=PIECE)
    plan = {name: source.extent(name).info for name in wanted}
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=shard_bytes) as writer:
        writer.copy("t2", source)
        with RowWriter(writer.stage, plan, shard_bytes) as rows:
            rows.copy_all(["t5"], source)
        writer.written_elsewhere(rows.rows)
        writer.copy_all([name for name in wanted if name not in ("t2", "t5")], source)
        writer.commit()
    found = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_source_that_breaks_off_is_said(tmp_path: Path) -> None:
    tensors(tmp_path)
    source = Held(tmp_path / SINGLE)
    plan = {"t2": source.extent("t2").info}
    os.truncate(tmp_path / SINGLE, source.extent("t2").offset + 2 * PIECE)
    with (
        CheckpointWriter(tmp_path / "out", plan) as writer,
        pytest.raises(CheckpointError, match="became shorter"),
    ):
        writer.copy("t2", source)


@pytest.mark.parametrize("place", [None, 0, 5000, SIZE - 1])
def test_bytes_are_compared_past_the_cache(tmp_path: Path, place: int | None) -> None:
    data = bytearray(random.Random(0).randbytes(SIZE))
    found = []
    for number, before in enumerate((b"", b"12345678", b"123")):
        changed = bytearray(data)
        if place is not None and number == 2:
            changed[place] ^= 1
        (tmp_path / str(number)).write_bytes(before + changed)
        forget(tmp_path / str(number))
        found.append(Extent(tmp_path / str(number), len(before), TensorInfo((SIZE,), torch.uint8)))
    assert same_bytes(found[0], found[1:]) == [True, place is None]


def test_a_tensor_is_read_past_the_cache(tmp_path: Path) -> None:
    wanted = tensors(tmp_path)
    for name, extent in read_header(tmp_path / SINGLE).items():
        assert torch.equal(extent.read(past=True), wanted[name])
    os.truncate(tmp_path / SINGLE, extent.offset + 100)
    with pytest.raises(CheckpointError, match="became shorter"):
        extent.read(past=True)


def test_what_cannot_be_asked_is_taken_as_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    with (tmp_path / "file").open("rb") as file:
        assert portable.cached_share(file.fileno(), 100, 0) == 1
        monkeypatch.delattr("mmap.MAP_SHARED")
        assert portable.cached_share(file.fileno(), 100, 9000) == 1
    monkeypatch.setattr(portable, "memory_bytes", lambda: 0)  # not known
    assert not past_cache.too_large(1 << 60)
