"""Results kept by content: what is computed again, and what is not."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judging import World
from safetensors.torch import load_file, save_file

from octad.checkpoint.load import open_source
from octad.evaluate import judge
from octad.evaluate.compare import Comparison, Settings, compare
from octad.evaluate.results import Cache, Record, default_directory

SETTINGS = Settings(100, 32, resamples=50)
MEMBERS = ["general", "lora", "full", "far"]
MIXTURES = ["mixture top-1", "mixture top-2", "mixture top-4"]


@pytest.fixture(scope="module", autouse=True)
def _exact() -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "compute_dtype", lambda device="cpu": torch.float32)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("cached"), "llama")


@pytest.fixture(scope="module")
def full(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A directory that knows everybody, and what was found."""
    directory = tmp_path_factory.mktemp("kept")
    return directory, run(world.mixture, world, directory)


@pytest.fixture
def kept(full: tuple[Path, Comparison], tmp_path: Path) -> Path:
    return Path(shutil.copytree(full[0], tmp_path / "kept"))


def run(mixture: Path, world: World, directory: Path, **options: Any) -> Comparison:
    settings = options.pop("settings", SETTINGS)
    return compare(open_source(mixture), world.domains, settings, cache=Cache(directory), **options)


def test_nothing_is_computed_twice(
    world: World, full: tuple[Path, Comparison], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = full[1]
    assert first.computed == [*MEMBERS, "soup", *MIXTURES]
    monkeypatch.setattr(judge, "fast_model", None)  # no model is even loaded
    again = run(world.mixture, world, kept)
    assert again.computed == []
    assert again.bits == first.bits
    assert again.differences == first.differences
    assert again.shares("one") == first.shares("one")
    assert {n: r.price for n, r in again.rows.items()} == {n: r.price for n, r in first.rows.items()}
    assert run(world.mixture, world, kept, settings=Settings(100, 32, seed=9, resamples=50)).computed == []


def test_one_more_contestant_is_computed_alone(world: World, kept: Path) -> None:
    found = run(world.mixture, world, kept, dense=[str(world.models["full"])])
    assert found.computed == ["dense full"]
    assert found.rows["dense full"].kind == "dense"
    assert found.bits["dense full"] == pytest.approx(found.bits["full"])
    assert "dense full" in {d.against for d in found.differences}
    # one that was judged before, as a member that the mixture does not hold, is known
    assert run(world.mixture, world, kept, dense=[str(world.models["far"])]).computed == []


def test_another_router_leaves_the_members(world: World, kept: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(world.mixture, tmp_path / "m"))
    change(copy, "gate.weight")
    assert run(copy, world, kept).computed == MIXTURES


def test_another_expert_leaves_the_other_members(world: World, kept: Path, tmp_path: Path) -> None:
    """And their soup, which is of the members as they lie on disk, since one has an attention of its own."""
    copy = Path(shutil.copytree(world.mixture, tmp_path / "m"))
    change(copy, "layers.1.block_sparse_moe.experts.1.w2.weight")
    assert run(copy, world, kept).computed == ["lora", *MIXTURES]


def change(directory: Path, part: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if part in name]:
        tensors[name] = tensors[name] * 1.01
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_other_windows_are_other_work(world: World, kept: Path) -> None:
    assert len(run(world.mixture, world, kept, settings=Settings(100, 31, resamples=50)).computed) == 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "of another"])
def test_damaged_entries_are_made_again(
    world: World, full: tuple[Path, Comparison], kept: Path, damage: str
) -> None:
    files = sorted(kept.glob("*.safetensors"))
    assert len(files) == 8
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    damaged = {
        "cut": bytes(content[:-10]),
        "flipped": bytes(content),
        "empty": b"",
        "of another": files[1].read_bytes(),
    }
    files[0].write_bytes(damaged[damage])
    found = run(world.mixture, world, kept)
    assert len(found.computed) == 1
    assert found.bits == full[1].bits
    assert run(world.mixture, world, kept).computed == []


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = run(world.mixture, world, tmp_path / "file" / "cache")
    assert len(found.computed) == 8
    assert not [p for p in tmp_path.iterdir() if p.name != "file"]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    record = Record(torch.tensor([0.5, 1.5]), {"tokens_per_second": 3.5}, torch.arange(6).view(1, 2, 3))
    cache.put("k", record)
    found = cache.get("k")
    assert found is not None
    assert found.load is not None
    assert record.load is not None
    assert np.array_equal(found.nats, record.nats)
    assert torch.equal(found.load, record.load)
    assert found.measured == record.measured
    assert cache.get("other") is None
    assert Cache(None).get("k") is None
    cache.put_plain("p", {"a": [1, 2.5, None]})
    assert cache.get_plain("p") == {"a": [1, 2.5, None]}
    path = tmp_path / "p.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    assert cache.get_plain("p") is None
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAD_CACHE", str(tmp_path))
    assert default_directory() == tmp_path / "evaluate"
    monkeypatch.delenv("OCTAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == Path("/x/octad/evaluate")
