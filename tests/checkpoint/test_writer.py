"""CheckpointWriter against the safetensors library and transformers; full disks, kills, and outputs that exist."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, TinyCheckpoint

from octad import staging
from octad.checkpoint import writer as writer_room
from octad.checkpoint.extent import Extent
from octad.checkpoint.hf import INDEX, SINGLE, SafetensorsSource
from octad.checkpoint.load import content_names
from octad.checkpoint.shard import DTYPE_NAMES, read_header
from octad.checkpoint.source import TensorInfo
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import CheckpointError, OutputError
from octad.staging import StagedDirectory

PLAN = {f"t{i}": TensorInfo((4, 8), torch.float32) for i in range(4)}


class Extents:
    """The tensors of one file, as much of a source as the writer's `copy` asks for."""

    def __init__(self, path: Path) -> None:
        self.extents = read_header(path)

    def extent(self, name: str) -> Extent:
        return self.extents[name]

    def read(self, name: str) -> torch.Tensor:
        return self.extents[name].read()


def plan_of(source: SafetensorsSource) -> dict[str, TensorInfo]:
    return {name: source.info(name) for name in source.names()}


def fill(writer: CheckpointWriter, value: float = 1.0) -> None:
    writer.add_text("config.json", "{}")
    for name in writer.plan:
        writer.write(name, torch.full(writer.plan[name].shape, value))


def save(out: Path, value: float = 1.0, *, overwrite: bool = False) -> None:
    with CheckpointWriter(out, PLAN, overwrite=overwrite) as writer:
        fill(writer, value)
        writer.commit()


def interrupted(out: Path, *, overwrite: bool = False) -> None:
    with CheckpointWriter(out, PLAN, overwrite=overwrite) as writer:
        fill(writer, 2.0)
        raise KeyboardInterrupt


def hidden(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith("."))


# ---- contents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["write", "copy"])
@pytest.mark.parametrize("layout", ["hub", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_we_write(
    family: str, layout: str, by: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    source = SafetensorsSource(tiny_checkpoint(family, layout))
    with CheckpointWriter(tmp_path / "out", plan_of(source), max_shard_bytes=30_000) as writer:
        writer.copy_in(source.directory / "config.json")
        for name in reversed(source.names()):  # any order
            if by == "copy":
                writer.copy(name, source)
            else:
                writer.write(name, source.read(name))
        assert writer.commit() == tmp_path / "out"
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "out", source.directory)
    )
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    again = SafetensorsSource(tmp_path / "out")
    assert set(content_names(again)) == set(source.names())
    assert hidden(tmp_path) == []


def test_one_file_without_index_and_every_dtype(tmp_path: Path) -> None:
    data = {f"x{i}": torch.arange(3 + i).to(torch.float32).to(d) for i, d in enumerate(DTYPE_NAMES)}
    data |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "turned": torch.randn(5, 7).T}
    plan = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in data.items()}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for name, tensor in data.items():
            writer.write(name, tensor)
        writer.add_bytes("blob", b"\x00\xff")
        writer.commit()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {SINGLE, "blob"}
    with safe_open(tmp_path / "out" / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(data)
        for name, tensor in data.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(
                found.flatten().view(torch.uint8), tensor.contiguous().flatten().view(torch.uint8)
            )


def test_tensors_are_aligned(tmp_path: Path) -> None:
    plan = {"a": TensorInfo((3,), torch.bfloat16), "b": TensorInfo((5,), torch.float32)}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        fill(writer)
        writer.commit()
    source_header = json.loads((tmp_path / "out" / SINGLE).read_bytes()[8:].split(b"}}")[0] + b"}}")
    for name, info in plan.items():
        assert source_header[name]["data_offsets"][0] % info.dtype.itemsize == 0


def test_converts_to_the_planned_dtype(tmp_path: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    source = SafetensorsSource(tiny_checkpoint("llama"))
    plan = {name: TensorInfo(info.shape, torch.bfloat16) for name, info in plan_of(source).items()}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        for i, name in enumerate(plan):
            if i % 2:
                writer.copy(name, source)
            else:
                writer.write(name, source.read(name))
        writer.commit()
    for name, tensor in load_file(tmp_path / "out" / SINGLE).items():
        assert torch.equal(tensor, source.read(name).bfloat16())


def test_shards_and_index(tmp_path: Path) -> None:
    plan = {f"t{i}": TensorInfo((i + 1, 100), torch.float32) for i in range(5)}  # 400 to 2000 bytes
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=1300) as writer:
        fill(writer)
        writer.commit()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 6000
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    found = {name: file.name for file in files for name in load_file(file)}
    assert found == index["weight_map"]


def test_copy_of_a_tensor_larger_than_the_buffer(tmp_path: Path) -> None:
    save_file({"head": torch.ones(3), "big": torch.randn(3, 1 << 18)}, tmp_path / SINGLE)  # 3 MiB
    source = Extents(tmp_path / SINGLE)
    with CheckpointWriter(tmp_path / "out", {"new": source.extent("big").info}) as writer:
        writer.copy("new", source, "big")
        writer.commit()
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["new"], source.read("big"))


def test_source_that_breaks_off_is_no_output_error(tmp_path: Path) -> None:
    save_file({"t": torch.ones(3, 1 << 18)}, tmp_path / SINGLE)
    source = Extents(tmp_path / SINGLE)
    os.truncate(tmp_path / SINGLE, 1 << 20)
    with CheckpointWriter(tmp_path / "out", {"t": source.extent("t").info}) as writer:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter"):
            writer.copy("t", source)
        with pytest.raises(CheckpointError, match="1 planned tensors not written"):
            writer.commit()


def many(tmp_path: Path) -> tuple[SafetensorsSource | Extents, dict[str, torch.Tensor]]:
    """Twenty tensors of random sizes in one file."""
    torch.manual_seed(0)
    tensors = {f"t{i:02}": torch.randn(int(torch.randint(1, 400, ()))) for i in range(20)}
    save_file(tensors, tmp_path / SINGLE)
    return Extents(tmp_path / SINGLE), tensors


@pytest.mark.parametrize("shard_bytes", [1, 1500, 1e9])
def test_copying_all_is_copying_each(tmp_path: Path, shard_bytes: float) -> None:
    source, tensors = many(tmp_path)
    plan = {name: source.extent(name).info for name in tensors}
    seen: list[float] = []
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=shard_bytes) as writer:
        writer.write("t07", tensors["t07"])
        writer.copy_all([name for name in tensors if name != "t07"], source, seen.append)
        writer.commit()
    found = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert seen == sorted(seen)
    assert len(seen) == 19
    assert seen[-1] == 1


@pytest.mark.parametrize("shard_bytes", [1, 1500, 1e9])
def test_large_tensors_are_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: float
) -> None:
    monkeypatch.setattr(writer_room, "PIECE_BYTES", 100)
    source, tensors = many(tmp_path)
    plan = {name: source.extent(name).info for name in tensors}
    seen: list[float] = []
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=shard_bytes) as writer:
        writer.copy_all(list(tensors), source, seen.append)
        assert writer.written == set(tensors)
        assert writer.full_shards == writer.shards
        writer.commit()
    found = {n: t for file in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert len(seen) == sum(-(-tensor.nbytes // 100) for tensor in tensors.values())


def test_rows_in_any_order_make_a_tensor(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).view(4, 3)
    plan = {"a": TensorInfo((4, 3), torch.float16), "b": TensorInfo((2,), torch.float32)}
    with CheckpointWriter(tmp_path / "out", plan) as writer:
        writer.write_rows("a", 3, tensor[3:])
        writer.write_rows("a", 0, tensor[:2])
        assert writer.written == set()
        writer.write_rows("b", 0, torch.ones(2))
        writer.write_rows("a", 2, tensor[2:3])
        assert writer.written == {"a", "b"}
        with pytest.raises(CheckpointError, match="written twice"):
            writer.write_rows("a", 0, tensor[:1])
        writer.commit()
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)["a"], tensor.half())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_copying_all_ends_with_an_error(tmp_path: Path, kind: type[BaseException]) -> None:
    source, tensors = many(tmp_path)
    plan = {name: source.extent(name).info for name in tensors}

    def stop(done: float) -> None:
        if done > 0.5:
            raise kind

    with pytest.raises(kind), CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=1500) as writer:
        writer.copy_all(list(tensors), source, stop)
    (tmp_path / SINGLE).unlink()
    writer = CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=1500)
    with writer, pytest.raises(CheckpointError, match="No such file"):
        writer.copy_all(list(tensors), source)
    assert list(tmp_path.iterdir()) == []


def test_a_full_shard_is_on_its_way_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, synced, real = {f"t{i}": TensorInfo((100,), torch.float32) for i in range(4)}, Event(), os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.set()

    monkeypatch.setattr(os, "fsync", fsync)
    with CheckpointWriter(tmp_path / "out", plan, max_shard_bytes=900) as writer:
        writer.write("t0", torch.ones(100))
        writer.write("t2", torch.ones(100))
        assert not synced.is_set()
        writer.write("t1", torch.ones(100))
        assert synced.wait(60)


# ---- mistakes -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_plan(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", PLAN) as writer:
        with pytest.raises(CheckpointError, match=r"t0 has shape \[8, 4\], planned was \[4, 8\]"):
            writer.write("t0", torch.ones(8, 4))
        with pytest.raises(CheckpointError, match="nope was not planned"):
            writer.write("nope", torch.ones(8, 4))
        writer.write("t0", torch.ones(4, 8))
        with pytest.raises(CheckpointError, match="t0 is written twice"):
            writer.write("t0", torch.ones(4, 8))
        with pytest.raises(CheckpointError, match="3 planned tensors not written, first t1"):
            writer.commit()
        for file in ("../escape", SINGLE, "a/b"):
            with pytest.raises(ValueError, match="bare name"):
                writer.add_text(file, "")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not open"):
        writer.write("t0", torch.ones(4, 8))


def test_without_commit_or_with_an_error_nothing_stays(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "a" / "out", PLAN) as writer:
        fill(writer)
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []


def test_output_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for value in (1.0, 2.0):
        save(out, value, overwrite=value == 2.0)
        with pytest.raises(OutputError, match="exists; choose another -o or remove it"):
            save(out)
        assert load_file(out / SINGLE)["t3"].eq(value).all()
        assert hidden(tmp_path) == []


def test_overwrite_replaces_only_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, message in (("home", "no checkpoint to overwrite"), ("file", "Not a directory")):
        with pytest.raises(OutputError, match=message):
            save(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_overwrite_that_fails_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "out", Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.endswith(".incomplete"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    save(out)
    with pytest.raises(KeyboardInterrupt):
        interrupted(out, overwrite=True)
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        save(out, 2.0, overwrite=True)
    assert load_file(out / SINGLE)["t0"].eq(1).all()
    assert hidden(tmp_path) == []


# ---- the operating system says no ---------------------------------------------------------------------------


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("pwrite", "posix_fallocate", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OutputError) as found:
                write_a_copy(tmp_path)
        assert str(found.value).startswith(f"{tmp_path / 'out'}: the disk is full: ")
        assert "bytes are needed" in str(found.value)
        assert "\n" not in str(found.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def write_a_copy(parent: Path) -> None:
    save_file({"t": torch.ones(8)}, parent / SINGLE)
    plan = {"t": TensorInfo((8,), torch.float32), "u": TensorInfo((8,), torch.float32)}
    with CheckpointWriter(parent / "out", plan) as writer:
        writer.copy("t", Extents(parent / SINGLE))
        writer.write("u", torch.ones(8))
        writer.commit()


def test_too_little_space_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    writer = CheckpointWriter(tmp_path / "deep" / "out", PLAN)
    with pytest.raises(OutputError, match=r"[\d,]+ bytes are needed, 100 bytes are free in"):
        writer.check_space()
    with pytest.raises(OutputError), writer:
        pytest.fail("opened")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=f"out: no permission to write in {tmp_path}"):
        CheckpointWriter(tmp_path / "out", PLAN).__enter__()


# ---- killed -------------------------------------------------------------------------------------------------

VICTIM = """
import sys, time, torch
from octad.checkpoint.source import TensorInfo
from octad.checkpoint.writer import CheckpointWriter
plan = {f"t{i}": TensorInfo((4, 8), torch.float32) for i in range(4)}
with CheckpointWriter(sys.argv[1], plan) as writer:
    writer.add_text("config.json", "{}")
    for name in plan:
        writer.write(name, torch.ones(4, 8))
    print("all but committed", flush=True)
    time.sleep(60)
"""


def test_killed_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(out)], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "all but committed\n"
    left = tmp_path / f".out.{victim.pid}.incomplete"
    with CheckpointWriter(out, PLAN):  # beside a living one: it is left alone
        assert left.exists()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    with pytest.raises(SafetensorError):
        load_file(left / SINGLE)
    with CheckpointWriter(out, PLAN) as writer:
        assert not left.exists()
        fill(writer)
        writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_dead_reused_and_living_pids(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftovers = [f".out.{pid}.incomplete" for pid in (dead.pid, os.getpid(), os.getppid())]
    foreign = [".out.txt.incomplete", ".other.1.incomplete", ".out.1.complete"]
    for name in leftovers + foreign:
        (tmp_path / name).mkdir()
    with StagedDirectory(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == sorted([leftovers[2], *foreign])


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    old = tmp_path / ".out.999999999.old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="exists"):
        StagedDirectory(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "config.json").exists()  # put back
