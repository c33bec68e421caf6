"""What octad keeps beside weights is not taken for weights by any engine, and old mixtures are still read."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from members import FFN, adapter, full_member, make_base, make_recipe, text_file
from weight_files import taken_for_weights, tensors_found

from octad.checkpoint.load import open_source
from octad.checkpoint.names import tensor_plan
from octad.combine.build import combine
from octad.combine.edit import add_expert, remove_expert
from octad.combine.editable import EditableMixture
from octad.combine.preflight import preflight
from octad.combine.recipe import ExpertSpec

OLD, NEW = "router_statistics.safetensors", "router_statistics.octad"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("globs")
    base = make_base(directory / "base")
    models = ["base", str(full_member(base, directory / "full", 1, only=".mlp."))]
    entries = [
        {"name": f"m{e}", "model": model, "data": str(text_file(directory, e))}
        for e, model in enumerate(models)
    ]
    recipe = make_recipe(base, entries, router={"method": "ridge", "tokens": 200})
    return combine(preflight(recipe), directory / "mixture", max_shard_bytes=60_000)


def assert_weights_only(directory: Path) -> None:
    source = open_source(directory)
    found = tensors_found(directory)
    assert found == set(tensor_plan(source.config))
    assert taken_for_weights(directory) == {p.name for p in directory.glob("model*.safetensors")}
    _, problems = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(problems.values())


def test_globs_find_weights_only(mixture: Path, tmp_path: Path) -> None:
    assert_weights_only(mixture)
    base = mixture.parent / "base"
    spec = ExpertSpec(
        name="new",
        model=str(adapter(base, tmp_path / "new", 3, FFN)),
        data=(str(text_file(tmp_path, 9)),),
    )
    added = add_expert(mixture, spec, tmp_path / "added")
    assert_weights_only(added)
    assert_weights_only(remove_expert(added, "new"))


def test_a_mixture_with_the_old_name(mixture: Path, tmp_path: Path) -> None:
    """It opens as before, and a change in place leaves the new name alone."""
    old = shutil.copytree(mixture, tmp_path / "old")
    (old / NEW).rename(old / OLD)
    ours, theirs = EditableMixture.open(mixture), EditableMixture.open(old)
    assert ours.calibrations == theirs.calibrations
    assert ours.statistics is not None
    assert theirs.statistics is not None
    assert torch.equal(ours.statistics.grams, theirs.statistics.grams)
    base = mixture.parent / "base"
    model = str(full_member(base, tmp_path / "new", 4, only=".mlp."))
    add_expert(old, ExpertSpec(name="new", model=model, data=(str(text_file(tmp_path, 9)),)))
    assert (old / NEW).exists()
    assert not (old / OLD).exists()
    assert_weights_only(old)
