"""One expert added, replaced, removed: the same as combining afresh, and every refusal."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from members import (
    FFN,
    adapter,
    eight_members,
    extended,
    full_member,
    make_base,
    make_recipe,
    save_tokenizer,
    text_file,
)
from safetensors.torch import load_file

from octad.checkpoint.load import open_source
from octad.combine import build, edit
from octad.combine.build import combine
from octad.combine.edit import add_expert, remove_expert, replace_expert
from octad.combine.preflight import preflight
from octad.combine.recipe import ExpertSpec, Recipe
from octad.errors import CheckpointError, OctadError, OutputError, RecipeError
from octad.staging import alone

METHODS = ("ridge", "logistic", "prompts", "random")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    for module in (build, edit):
        monkeypatch.setattr(module, "compute_dtype", lambda: torch.float32)


class World:
    """A base and eight members, and mixtures of them, each made once."""

    def __init__(self, directory: Path, family: str, **changes: Any) -> None:
        self.directory = directory
        self.base = make_base(directory / "base", family, **changes)
        self.entries = eight_members(directory, self.base)

    def recipe(self, experts: list[int], **changes: Any) -> Recipe:
        return make_recipe(self.base, [self.entries[e] for e in experts], **changes)

    def mixture(self, experts: list[int], **changes: Any) -> Path:
        name = "-".join(map(str, experts)) + re.sub(r"\W+", "_", repr(changes))
        output = self.directory / f"mixture-{name}"
        if not output.exists():
            combine(preflight(self.recipe(experts, **changes)), output)
        return output

    def spec(self, e: int, **changes: Any) -> ExpertSpec:
        return ExpertSpec(**(self.entries[e] | changes))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("edit"), "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> World:
    """In float32, so that nothing of a difference between routers is rounded away."""
    return World(tmp_path_factory.mktemp("sharp"), "qwen3")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_router(name: str) -> bool:
    return re.search(r"(mlp|block_sparse_moe)\.gate\.weight$", name) is not None


def assert_same_mixture(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if is_router(name):
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))
        else:
            assert torch.equal(ours[name], tensor), name
    assert json.loads((found / "config.json").read_text()) == json.loads(
        (expected / "config.json").read_text()
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (found / file).read_text() == (expected / file).read_text()


def octad_json(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "octad.json").read_text())


# ---- the same as combining afresh ----------------------------------------------------------------------------


@pytest.mark.parametrize("e", [6, 7])
@pytest.mark.parametrize("method", METHODS)
def test_adding_the_eighth_is_combining_eight(sharp: World, tmp_path: Path, method: str, e: int) -> None:
    router = {"method": method, "tokens": 400, "window": 64}
    seven = [i for i in range(8) if i != e]
    output = add_expert(sharp.mixture(seven, router=router), sharp.spec(e), tmp_path / "m")
    expected = sharp.mixture([*seven, e], router=router)
    assert_same_mixture(output, expected)
    ours, theirs = octad_json(output), octad_json(expected)
    assert ours.pop("edits") == [f"add m{e}"]
    assert theirs.pop("edits") == []
    assert ours == theirs
    ours, theirs = (load_file(d / "router_statistics.octad") for d in (output, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_bfloat16_adapter_on_the_generalist(world: World, tmp_path: Path) -> None:
    output = add_expert(world.mixture([0, 1, 2]), world.spec(5), tmp_path / "m")
    assert_same_mixture(output, world.mixture([0, 1, 2, 5]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gone", [0, 2, 3])
def test_removing_is_combining_the_others(sharp: World, tmp_path: Path, method: str, gone: int) -> None:
    router = {"method": method, "tokens": 400, "window": 64}
    said: list[str] = []
    output = remove_expert(
        sharp.mixture([0, 1, 2, 3], router=router),
        f"m{gone}",
        tmp_path / "m",
        tell=said.append,
    )
    assert_same_mixture(output, sharp.mixture([e for e in range(4) if e != gone], router=router))
    refitted = gone == 0 and method in ("ridge", "logistic")
    assert any("generalist changes" in line for line in said) == refitted


@pytest.mark.parametrize("place", [0, 1, 3])
def test_replacing_is_combining_with_the_other(sharp: World, tmp_path: Path, place: int) -> None:
    base = str(sharp.base)
    output = replace_expert(
        sharp.mixture([0, 1, 2, 3]), f"m{place}", sharp.spec(5), tmp_path / "m", base=base
    )
    assert_same_mixture(output, sharp.mixture([5 if e == place else e for e in range(4)]))
    assert octad_json(output)["edits"] == [f"replace m{place} with m5"]


def test_replacing_keeps_a_name_and_takes_new_text(sharp: World, tmp_path: Path) -> None:
    new = text_file(tmp_path, 99)
    output = replace_expert(sharp.mixture([0, 1, 2]), "m1", sharp.spec(1, data=str(new)), tmp_path / "m")
    entries = [sharp.entries[0], sharp.entries[1] | {"data": [str(new)]}, sharp.entries[2]]
    expected = combine(preflight(make_recipe(sharp.base, entries)), tmp_path / "expected")
    assert_same_mixture(output, expected)
    assert octad_json(output)["edits"] == ["replace m1"]


def test_remove_then_add_back(sharp: World, tmp_path: Path) -> None:
    without = remove_expert(sharp.mixture([0, 1, 2, 3]), "m3", tmp_path / "a")
    again = add_expert(without, sharp.spec(3), tmp_path / "b")
    assert_same_mixture(again, sharp.mixture([0, 1, 2, 3]))
    assert octad_json(again)["edits"] == ["remove m3", "add m3"]


@pytest.mark.parametrize("arrives", ["base", "adapter"])
def test_without_a_generalist(sharp: World, tmp_path: Path, arrives: str) -> None:
    """The recorded base is opened; a base that arrives becomes everybody's generalist."""
    e = 0 if arrives == "base" else 2
    output = add_expert(sharp.mixture([1, 4]), sharp.spec(e), tmp_path / "m")
    assert_same_mixture(output, sharp.mixture([1, 4, e]))


def test_the_only_generalist_among_two_bases(sharp: World, tmp_path: Path) -> None:
    """A second base does not disturb the first; when the first goes, the second takes over."""
    twin = sharp.spec(0, name="twin", data=sharp.entries[4]["data"][0])
    entries = [sharp.entries[0], sharp.entries[1], twin.model_dump(exclude_defaults=True)]
    three = combine(preflight(make_recipe(sharp.base, entries)), tmp_path / "three")
    assert_same_mixture(add_expert(sharp.mixture([0, 1]), twin, tmp_path / "added"), three)
    expected = combine(preflight(make_recipe(sharp.base, entries[1:])), tmp_path / "two")
    assert_same_mixture(remove_expert(three, "m0", tmp_path / "left"), expected)


def test_qwen2_keeps_its_inert_shared_expert(tmp_path: Path) -> None:
    world = World(tmp_path, "qwen2")
    output = add_expert(world.mixture([0, 1, 2]), world.spec(3), tmp_path / "m")
    assert_same_mixture(output, world.mixture([0, 1, 2, 3]))


# ---- vocabulary ----------------------------------------------------------------------------------------------


def test_a_newcomer_adds_tokens(sharp: World, tmp_path: Path) -> None:
    wide = {
        "name": "wide",
        "model": str(extended(sharp.base, tmp_path / "wide", 3)),
        "data": sharp.entries[3]["data"],
    }
    output = add_expert(sharp.mixture([0, 1]), ExpertSpec(**wide), tmp_path / "m")
    entries = [sharp.entries[0], sharp.entries[1], wide]
    assert_same_mixture(output, combine(preflight(make_recipe(sharp.base, entries)), tmp_path / "e"))
    then = add_expert(output, sharp.spec(2), tmp_path / "then")  # an adapter on the base's own 257 rows
    entries += [sharp.entries[2]]
    assert_same_mixture(then, combine(preflight(make_recipe(sharp.base, entries)), tmp_path / "e2"))


def test_a_newcomer_with_another_tokenizer(sharp: World, tmp_path: Path) -> None:
    full_member(sharp.base, tmp_path / "other", 3)
    save_tokenizer(tmp_path / "other", swap=True)
    spec = sharp.spec(3, model=str(tmp_path / "other"))
    with pytest.raises(RecipeError, match="share one tokenizer"):
        add_expert(sharp.mixture([0, 1]), spec, tmp_path / "m")


# ---- where it is written -------------------------------------------------------------------------------------


def test_in_place(sharp: World, tmp_path: Path) -> None:
    directory = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "m")
    (directory / "notes.txt").write_text("mine")
    assert add_expert(directory, sharp.spec(3)) == directory
    assert_same_mixture(directory, sharp.mixture([0, 1, 2, 3]))
    assert (directory / "notes.txt").read_text() == "mine"
    card = (directory / "README.md").read_text()
    assert "| 3 | m3 |" in card
    assert "Changed since it was first combined: add m3." in card
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    remove_expert(directory, "m3")
    assert_same_mixture(directory, sharp.mixture([0, 1, 2]))


@pytest.mark.parametrize("stage", ["calibrating", "writing"])
def test_an_interruption_leaves_the_old_mixture(sharp: World, tmp_path: Path, stage: str) -> None:
    directory = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "m")

    def stop(now: str, done: float) -> None:
        if now == stage and done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_expert(directory, sharp.spec(3), progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same_mixture(directory, sharp.mixture([0, 1, 2]))


def test_in_place_refuses_to_lose_a_directory(sharp: World, tmp_path: Path) -> None:
    directory = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "m")
    (directory / ".git").mkdir()
    with pytest.raises(OutputError, match=r"holds the directory \.git"):
        remove_expert(directory, "m2")
    remove_expert(directory, "m2", tmp_path / "n")


def test_an_existing_output_is_refused(sharp: World, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(OutputError, match="exists"):
        remove_expert(sharp.mixture([0, 1, 2]), "m2", tmp_path / "m")


# ---- refusals ------------------------------------------------------------------------------------------------


def refusal(kind: type[OctadError], call: Any, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names(sharp: World, tmp_path: Path) -> None:
    mixture, out = sharp.mixture([0, 1, 2]), tmp_path / "m"
    assert "has an expert 'm1' already" in refusal(RecipeError, add_expert, mixture, sharp.spec(1), out)
    assert "has an expert 'm2' already" in refusal(
        RecipeError, replace_expert, mixture, "m1", sharp.spec(2), out
    )
    for call in (
        lambda: remove_expert(mixture, "m9", out),
        lambda: replace_expert(mixture, "m9", sharp.spec(3), out),
    ):
        assert re.search(r"no expert 'm9'; did you mean 'm\d'", refusal(RecipeError, call))
    assert "it has m0, m1, m2" in refusal(RecipeError, remove_expert, mixture, "zebra", out)
    assert not out.exists()


def test_a_name_that_the_comparison_uses(sharp: World, tmp_path: Path) -> None:
    """Refused for whoever joins, before anything is opened; whoever has it already can leave."""
    entries = [sharp.entries[0] | {"name": "soup"}, *sharp.entries[1:3]]
    with pytest.raises(RecipeError, match="expert 'soup': `octad evaluate`"):
        preflight(make_recipe(tmp_path / "no base", entries))
    mixture = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "mixture")
    with pytest.raises(RecipeError, match="expert 'oracle': `octad evaluate`"):
        add_expert(mixture, sharp.spec(3, name="oracle"))
    text = (mixture / "octad.json").read_text()
    (mixture / "octad.json").write_text(text.replace('"m1"', '"soup"'))
    remove_expert(mixture, "soup")
    assert [e["name"] for e in json.loads((mixture / "octad.json").read_text())["experts"]] == ["m0", "m2"]


def test_too_few_left(sharp: World, tmp_path: Path) -> None:
    assert "has at least 2" in refusal(
        RecipeError, remove_expert, sharp.mixture([0, 1], top_k=1), "m1", tmp_path / "m"
    )
    three = sharp.mixture([0, 1, 2], top_k=3)
    assert "each token uses 3" in refusal(RecipeError, remove_expert, three, "m1", tmp_path / "m")


def test_not_made_by_octad(sharp: World, tmp_path: Path) -> None:
    directory = shutil.copytree(sharp.mixture([0, 1]), tmp_path / "m")
    (directory / "octad.json").unlink()
    assert "octad combine" in refusal(CheckpointError, remove_expert, directory, "m1")
    assert "octad combine" in refusal(CheckpointError, add_expert, sharp.base, sharp.spec(1))
    assert "no such" in refusal(CheckpointError, remove_expert, tmp_path / "nowhere", "m1")


def test_damaged_records(sharp: World, tmp_path: Path) -> None:
    directory = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "m")
    (directory / "router_statistics.octad").write_bytes(b"rubbish")
    assert "combine again" in refusal(CheckpointError, remove_expert, directory, "m1")
    raw = octad_json(directory)
    (directory / "octad.json").write_text(json.dumps(raw | {"experts": raw["experts"][:2]}))
    assert "names 2 experts" in refusal(CheckpointError, remove_expert, directory, "m1")
    (directory / "octad.json").write_text("{")
    assert "damaged" in refusal(CheckpointError, remove_expert, directory, "m1")


def test_a_base_that_cannot_be_opened_or_is_another(tmp_path: Path) -> None:
    world = World(tmp_path / "w", "llama")
    mixture = world.mixture([1, 4])
    moved = world.base.rename(tmp_path / "moved")
    message = refusal(RecipeError, add_expert, mixture, world.spec(2), tmp_path / "m")
    assert "cannot be opened" in message
    assert "--base" in message
    stranger = full_member(moved, tmp_path / "stranger", 5)
    message = refusal(RecipeError, add_expert, mixture, world.spec(2), tmp_path / "m", base=str(stranger))
    assert "is not the one" in message
    output = add_expert(mixture, world.spec(2), tmp_path / "m", base=str(moved))
    moved.rename(world.base)
    assert_same_mixture(output, world.mixture([1, 4, 2]))


def test_members_that_do_not_fit(sharp: World, tmp_path: Path) -> None:
    mixture, out = sharp.mixture([0, 1]), tmp_path / "m"
    wide = make_base(tmp_path / "wide", "qwen3", hidden_size=64)
    other = make_base(tmp_path / "other", "llama")
    assert "hidden_size is 64" in refusal(
        RecipeError, add_expert, mixture, sharp.spec(3, model=str(wide)), out
    )
    assert "llama model" in refusal(RecipeError, add_expert, mixture, sharp.spec(3, model=str(other)), out)
    assert "qwen3_moe" in refusal(RecipeError, add_expert, mixture, sharp.spec(3, model=str(mixture)), out)
    unfit = adapter(wide, tmp_path / "unfit", 1, FFN)
    assert "another base" in refusal(RecipeError, add_expert, mixture, sharp.spec(3, model=str(unfit)), out)
    assert "no such" in refusal(RecipeError, add_expert, mixture, sharp.spec(3, model="nowhere"), out)
    assert not out.exists()


def test_text_is_needed(sharp: World, tmp_path: Path) -> None:
    mixture, out = sharp.mixture([0, 1]), tmp_path / "m"
    assert "needs data" in refusal(RecipeError, add_expert, mixture, sharp.spec(3, data=()), out)
    assert "no such file" in refusal(
        OctadError, add_expert, mixture, sharp.spec(3, data="nowhere.jsonl"), out
    )


def test_the_result_opens(sharp: World, tmp_path: Path) -> None:
    source = open_source(add_expert(sharp.mixture([0, 1]), sharp.spec(3), tmp_path / "m"))
    assert source.config.num_experts == 3


def test_a_refused_edit_removes_what_a_killed_one_left(sharp: World, tmp_path: Path) -> None:
    """An edit that was killed after its last step is refused when it is asked for again; its trash goes all the same."""
    mixture = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "mix")
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    for kind in ("trash", "incomplete"):
        (tmp_path / f".mix.{gone.pid}.{kind}").mkdir()
    refusal(RecipeError, add_expert, mixture, sharp.spec(1))
    assert [path.name for path in tmp_path.iterdir()] == ["mix"]


def test_two_edits_in_place_at_once(sharp: World, tmp_path: Path) -> None:
    """The second would undo the first: it is refused while that one works, and when it began before that one's end."""
    mixture = shutil.copytree(sharp.mixture([0, 1, 2]), tmp_path / "mix")
    with alone(mixture):
        assert "another process is changing it" in refusal(OutputError, remove_expert, mixture, "m1")
    opened = edit.EditableMixture.open(mixture)
    remove_expert(mixture, "m1")
    assert "was changed by another process meanwhile" in refusal(OutputError, opened.check_same)
    assert octad_json(mixture)["edits"] == ["remove m1"]
