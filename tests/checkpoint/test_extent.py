"""Bytes of tensors on disk: copied and compared against plain Python over the whole file."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octad.checkpoint import extent as room
from octad.checkpoint.extent import Extent, same_bytes
from octad.checkpoint.shard import read_header
from octad.checkpoint.source import TensorInfo
from octad.errors import CheckpointError


@pytest.fixture
def extents(tmp_path: Path) -> dict[str, Extent]:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(7), "big": torch.randn(50, 41).bfloat16(), "z": torch.randn(3)}
    save_file(tensors, tmp_path / "in.safetensors")
    return read_header(tmp_path / "in.safetensors")


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_blocks_are_runs_of_values(extents: dict[str, Extent]) -> None:
    values = load_file(extents["big"].path)["big"].flatten()
    found = extents["big"].blocks([0, 3, 2000], 50)
    assert torch.equal(found, torch.stack([values[i : i + 50] for i in (0, 3, 2000)]))


def test_no_read_reaches_behind_its_tensor(extents: dict[str, Extent]) -> None:
    """What lies there is the next tensor of the file, so nothing else would notice."""
    big = extents["big"]
    size = big.info.numel
    assert big.blocks([size - 5], 5).shape == (1, 5)
    for starts, count in (([size - 4], 5), ([0, size], 1), ([-1], 1), ([0], size + 1)):
        with pytest.raises(CheckpointError, match="were asked for"):
            big.blocks(starts, count)
    with pytest.raises(CheckpointError, match="were asked for"):
        big.part(1, big.info.shape)
    with big.opened() as file, pytest.raises(CheckpointError, match="behind the end"):
        big.fill(file, memoryview(bytearray(8)), big.info.nbytes - 4)


def test_a_file_that_became_shorter(extents: dict[str, Extent]) -> None:
    big = extents["big"]
    with open(big.path, "r+b") as file:
        file.truncate(big.offset + 8)
    with pytest.raises(CheckpointError, match="became shorter"):
        big.read()


def by_the_kernel(patch: pytest.MonkeyPatch) -> None:
    """Whatever this system does."""


def not_there(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "copy_file_range", raising=False)


def refused(patch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    patch.setattr(os, "copy_file_range", refuse, raising=False)


def half_way(patch: pytest.MonkeyPatch) -> None:
    """As where a signal or a boundary ends it: some bytes are copied, then no more."""
    calls = []

    def copy(source: int, target: int, count: int, start: int, position: int) -> int:
        calls.append(count)
        if len(calls) > 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.pwrite(target, os.pread(source, min(count, 1001), start), position)

    patch.setattr(os, "copy_file_range", copy, raising=False)


@pytest.mark.parametrize("how", [by_the_kernel, not_there, refused, half_way])
def test_copies(
    extents: dict[str, Extent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[..., None]
) -> None:
    how(monkeypatch)
    monkeypatch.setattr(room, "BUFFER_BYTES", 512)
    expected = raw(load_file(extents["big"].path)["big"])
    with (tmp_path / "out").open("wb") as file:
        file.write(b"x" * 5000)
        file.flush()
        extents["big"].copy_to(file.fileno(), 100)
    assert (tmp_path / "out").read_bytes() == b"x" * 100 + expected + b"x" * (5000 - 100 - len(expected))


@pytest.mark.parametrize("how", [by_the_kernel, not_there])
def test_a_copy_says_which_side_failed(
    extents: dict[str, Extent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[..., None]
) -> None:
    how(monkeypatch)
    (tmp_path / "out").write_bytes(b"")
    with (tmp_path / "out").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        extents["big"].copy_to(file.fileno(), 0)  # opened for reading alone
    os.truncate(extents["big"].path, extents["big"].offset + 10)
    with (tmp_path / "out").open("wb") as file, pytest.raises(CheckpointError, match="became shorter"):
        extents["big"].copy_to(file.fileno(), 0)
    extents["big"].path.unlink()
    with (tmp_path / "out").open("wb") as file, pytest.raises(CheckpointError, match="No such file"):
        extents["big"].copy_to(file.fileno(), 0)


@pytest.mark.parametrize("stripe", [32, 1000])
@pytest.mark.parametrize("size", [0, 1, 16, 40, 64, 65])
def test_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, stripe: int) -> None:
    """One byte changed, or none, in each of several files; the buffer is smaller than the tensor, which one thread
    compares or several."""
    monkeypatch.setattr(room, "BUFFER_BYTES", 16)
    monkeypatch.setattr(room, "STRIPE_BYTES", stripe)
    draw = random.Random(size)
    data = draw.randbytes(size)
    extents, expected = [], []
    for number, place in enumerate([None, *range(size)]):
        changed = bytearray(data)
        if place is not None:
            changed[place] ^= 1
        path, before = tmp_path / str(number), draw.randbytes(number % 5)
        path.write_bytes(before + changed + b"after")
        extents.append(Extent(path, len(before), TensorInfo((size,), torch.uint8)))
        expected.append(bytes(changed) == data)
    assert same_bytes(extents[0], extents) == expected
    for other, same in zip(extents, expected, strict=True):
        assert same_bytes(extents[0], [other]) == [same]
    assert same_bytes(extents[0], []) == []


def test_what_lies_in_one_place_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that is a link to the base's file, or the hub's cache of both."""
    (tmp_path / "one").write_bytes(bytes(range(60)) * 2)
    (tmp_path / "link").hardlink_to(tmp_path / "one")
    (tmp_path / "copy").write_bytes((tmp_path / "one").read_bytes())
    read: list[str] = []
    real = Extent.fill
    monkeypatch.setattr(Extent, "fill", lambda self, *rest: read.append(self.path.name) or real(self, *rest))  # type: ignore[func-returns-value]
    ours, linked, copied = (
        Extent(tmp_path / n, 0, TensorInfo((60,), torch.uint8)) for n in ("one", "link", "copy")
    )
    assert same_bytes(ours, [linked]) == [True]
    assert read == []
    again = Extent(tmp_path / "link", 60, ours.info)  # another place of it
    assert same_bytes(ours, [linked, again, copied]) == [True, True, True]
    assert set(read) == {"one", "link", "copy"}
