"""An expert added, replaced, removed where attention is made of all members: the same as combining afresh."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from members import ATTENTION, FFN, adapter, extended, full_member, make_base, make_recipe, text_file
from safetensors.torch import load_file

from octad.combine import build, edit, recombine
from octad.combine.build import combine
from octad.combine.edit import add_expert, remove_expert, replace_expert
from octad.combine.preflight import preflight
from octad.combine.recipe import ExpertSpec
from octad.errors import RecipeError

WAYS: list[dict[str, Any]] = [
    {"shared": "ties"},
    {"shared": "regmean", "router": {"method": "ridge", "tokens": 300}},
    {"shared": "mean", "repair": {"method": "closed-form", "tokens": 400, "window": 32}},
    {"shared": "base", "repair": {"method": "closed-form", "tokens": 400, "window": 32}},
]


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for module in (build, edit, recombine):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.float32)


class World:
    def __init__(self, directory: Path) -> None:
        self.directory, self.base = directory, make_base(directory / "base")
        models = [
            "base",
            adapter(self.base, directory / "m1", 1, FFN + ATTENTION),
            full_member(self.base, directory / "m2", 2),
            full_member(self.base, directory / "m3", 3),
        ]
        self.entries = [
            {"name": f"m{e}", "model": str(model), "data": [str(text_file(directory, e, 12))]}
            for e, model in enumerate(models)
        ]

    def mixture(self, output: Path, experts: list[int], **changes: Any) -> Path:
        recipe = make_recipe(self.base, [self.entries[e] for e in experts], **changes)
        return combine(preflight(recipe), output)

    def spec(self, e: int) -> ExpertSpec:
        return ExpertSpec(**self.entries[e])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("recombine"))


def assert_same(found: Path, expected: Path, edits: list[str]) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    records = [json.loads((path / "octad.json").read_text()) for path in (found, expected)]
    assert [record.pop("edits") for record in records] == [edits, []]
    assert records[0] == records[1]
    for file in ("config.json", "tokenizer.json"):
        assert (found / file).read_text() == (expected / file).read_text()
    stored = [load_file(path / "router_statistics.octad") for path in (found, expected)]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][name], tensor) for name, tensor in stored[1].items())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_adding(world: World, tmp_path: Path, way: dict[str, Any]) -> None:
    said: list[str] = []
    before = world.mixture(tmp_path / "three", [0, 1, 2], **way)
    after = add_expert(before, world.spec(3), tmp_path / "four", tell=said.append)
    assert_same(after, world.mixture(tmp_path / "fresh", [0, 1, 2, 3], **way), ["add m3"])
    assert "made of all members: they are read again from where they lay" in said[0]
    assert any(line.startswith("expert 'm3': ") for line in said)


@pytest.mark.parametrize("way", WAYS[1:3], ids=str)
def test_removing_in_place(world: World, tmp_path: Path, way: dict[str, Any]) -> None:
    mixture = world.mixture(tmp_path / "m", [0, 1, 2, 3], **way)
    (mixture / "notes.txt").write_text("mine")
    assert remove_expert(mixture, "m1") == mixture
    assert_same(mixture, world.mixture(tmp_path / "fresh", [0, 2, 3], **way), ["remove m1"])
    assert (mixture / "notes.txt").read_text() == "mine"


def test_replacing(world: World, tmp_path: Path) -> None:
    before = world.mixture(tmp_path / "m", [0, 1, 2], shared="mean")
    after = replace_expert(before, "m1", world.spec(3), tmp_path / "n")
    assert_same(after, world.mixture(tmp_path / "fresh", [0, 3, 2], shared="mean"), ["replace m1 with m3"])


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_that_is_gone_or_changed(world: World, tmp_path: Path) -> None:
    place = shutil.copytree(world.entries[2]["model"], tmp_path / "moved")
    entries = [*world.entries[:2], world.entries[2] | {"model": str(place)}]
    mixture = combine(preflight(make_recipe(world.base, entries, shared="mean")), tmp_path / "m")
    before = {path.name: path.read_bytes() for path in mixture.iterdir()}
    (place / "config.json").write_text((place / "config.json").read_text() + " ")
    said = refusal(add_expert, mixture, world.spec(3))
    assert "changed since the mixture was made" in said
    assert "put it back, or combine again" in said
    shutil.rmtree(place)
    said = refusal(remove_expert, mixture, "m1")
    assert "'m2'" in said
    assert "put it back" in said
    assert {path.name: path.read_bytes() for path in mixture.iterdir()} == before


def test_one_who_leaves_need_not_be_there(world: World, tmp_path: Path) -> None:
    place = shutil.copytree(world.entries[3]["model"], tmp_path / "moved")
    entries = [*world.entries[:3], world.entries[3] | {"model": str(place)}]
    mixture = combine(preflight(make_recipe(world.base, entries, shared="mean")), tmp_path / "m")
    shutil.rmtree(place)
    remove_expert(mixture, "m3")
    assert_same(mixture, world.mixture(tmp_path / "fresh", [0, 1, 2], shared="mean"), ["remove m3"])


def test_training_is_not_lost_in_silence(world: World, tmp_path: Path) -> None:
    mixture = world.mixture(tmp_path / "m", [0, 1, 2], shared="mean")
    raw = json.loads((mixture / "octad.json").read_text())
    raw["edits"] = ["trained (repair, 20 steps)"]
    (mixture / "octad.json").write_text(json.dumps(raw))
    said = refusal(remove_expert, mixture, "m1")
    assert "what was trained (repair, 20 steps) lost" in said


def test_tokens_that_members_added(world: World, tmp_path: Path) -> None:
    more = {
        "name": "x",
        "model": str(extended(world.base, tmp_path / "x", 5)),
        "data": world.entries[2]["data"],
    }
    recipe = make_recipe(world.base, [*world.entries[:2], more], shared="mean")
    mixture = combine(preflight(recipe), tmp_path / "m")
    assert "some add tokens" in refusal(remove_expert, mixture, "m1")
