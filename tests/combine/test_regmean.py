"""RegMean: against numpy's least squares on the text itself, and mixtures of members with attention of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from members import ATTENTION, FFN, adapter, exact, full_member, make_base, make_recipe, text_file

from octad.checkpoint.load import open_source
from octad.combine import build
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe
from octad.combine.regmean import regress
from octad.errors import RecipeError

_exact = exact(build)


def test_it_is_numpys_least_squares() -> None:
    """All texts below each other, each answered by its own member."""
    torch.manual_seed(0)
    texts = [torch.randn(n, 6) @ torch.randn(6, 6) for n in (40, 9, 25)]
    weights = [torch.randn(4, 6) for _ in texts]
    answers = torch.cat([x @ w.T for x, w in zip(texts, weights, strict=True)])
    expected, *_ = np.linalg.lstsq(torch.cat(texts).double().numpy(), answers.double().numpy(), rcond=None)
    grams = [x.T @ x for x in texts]
    found = regress(torch.stack(weights).mean(0), zip(weights, grams, strict=True), 1.0)
    np.testing.assert_allclose(found.T.numpy(), expected, rtol=1e-3, atol=1e-3)


def test_without_correlations_each_column_is_a_weighted_mean() -> None:
    weights, grams = [torch.ones(2, 3), torch.full((2, 3), 5.0)], [torch.ones(3, 3), torch.full((3, 3), 3.0)]
    found = regress(torch.full((2, 3), 3.0), zip(weights, grams, strict=True), 0.0)
    torch.testing.assert_close(found, torch.full((2, 3), 4.0), rtol=1e-5, atol=1e-5)


def test_where_no_text_goes_the_mean_stays() -> None:
    gram = torch.zeros(3, 3)
    gram[0, 0] = 1.0
    weights = [torch.zeros(1, 3), torch.full((1, 3), 2.0)]
    found = regress(torch.ones(1, 3), [(weights[0], torch.zeros(3, 3)), (weights[1], gram)], 1.0)
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0, 1.0]]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp(request.param)
    base = make_base(directory / "base", request.param)
    models = [
        "base",
        adapter(base, directory / "one", 1, FFN + ATTENTION),
        full_member(base, directory / "two", 2),
    ]
    experts = [
        {"name": f"m{e}", "model": str(model), "data": [str(text_file(directory, e, 40))]}
        for e, model in enumerate(models)
    ]
    return base, experts


def mixture(world: tuple[Path, list[Any]], output: Path, shared: Any) -> Path:
    recipe = make_recipe(
        world[0], world[1], top_k=1, router={"method": "ridge", "tokens": 2000}, shared=shared
    )
    return combine(preflight(recipe, output), output)


def test_the_first_layer_is_the_best_there_is(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    """Its inputs are known without octad: the embeddings, normalised by the norm that the mixture has. On them q, k and v
    miss the members' answers by what numpy's least squares miss them by, and by less than the members' mean does."""
    built = open_source(mixture(world, tmp_path / "regmean", {"method": "regmean", "correlation": 1.0}))
    plain = open_source(mixture(world, tmp_path / "linear", "linear"))
    recipe = make_recipe(world[0], world[1], top_k=1, router={"method": "ridge", "tokens": 2000})
    plan = preflight(recipe, measure=False)
    norm = built.read("model.layers.0.input_layernorm.weight").float()
    table = built.read("model.embed_tokens.weight").float()
    texts = [torch.tensor([i for w in text.windows for i in w.ids]) for text in plan.calibrations]
    inputs = [
        F.rms_norm(table[ids], norm.shape, norm, built.config.rms_norm_eps) / len(ids) ** 0.5 for ids in texts
    ]
    for part in ("q", "k", "v"):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        x = torch.cat(inputs)
        wanted = torch.cat([i @ m.read(name).float().T for i, m in zip(inputs, plan.members, strict=True)])
        best = np.linalg.lstsq(x.double().numpy(), wanted.double().numpy(), rcond=None)[0]
        least = float((x.double() @ torch.from_numpy(best) - wanted).square().sum())
        missed = {
            title: float((x @ source.read(name).float().T - wanted).square().sum())
            for title, source in (("regmean", built), ("linear", plain))
        }
        assert missed["regmean"] <= 1.001 * least
        assert missed["regmean"] < missed["linear"]


def test_all_layers_are_settled_and_norms_are_means(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    built = open_source(mixture(world, tmp_path / "regmean", "regmean"))
    plain = open_source(mixture(world, tmp_path / "linear", "linear"))
    for name in plain.names():
        if "self_attn" in name and name.endswith("proj.weight"):
            assert not torch.equal(built.read(name), plain.read(name)), name
        elif "mlp" not in name and "moe" not in name:
            assert torch.equal(built.read(name), plain.read(name)), name


def test_the_mixture_loads_in_transformers(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    path = mixture(world, tmp_path / "out", "regmean")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model(torch.arange(20)[None]).logits.isfinite().all()
    assert json.loads((path / "octad.json").read_text())["recipe"]["shared"]["method"] == "regmean"


def test_members_with_the_bases_attention_keep_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    experts = [
        {"name": "general", "model": "base", "data": [str(text_file(tmp_path, 1))]},
        {
            "name": "one",
            "model": str(adapter(base, tmp_path / "one", 1)),
            "data": [str(text_file(tmp_path, 2))],
        },
    ]
    built = open_source(mixture((base, experts), tmp_path / "out", "regmean"))
    own = open_source(base)
    for name in own.names():
        if "self_attn" in name:
            torch.testing.assert_close(built.read(name), own.read(name), rtol=1e-4, atol=1e-5)


def test_routers_that_read_no_text_cannot_settle_anything() -> None:
    experts = [{"name": n, "model": "base", "positive_prompts": ["a"]} for n in "ab"]
    raw = {"base": "b", "top_k": 1, "experts": experts, "router": {"method": "prompts"}, "shared": "regmean"}
    with pytest.raises(RecipeError, match="shared: regmean is worked out of calibration text"):
        Recipe.from_dict(raw, Path(), "recipe r")
