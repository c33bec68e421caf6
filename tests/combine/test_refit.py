"""Closed-form repair: against numpy's least squares, members whose answer is known by algebra, and transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from members import ATTENTION, FFN, adapter, exact, full_member, make_base, make_recipe, text_file
from safetensors.torch import load_file

from octad.checkpoint.load import load_model, open_source
from octad.checkpoint.views import ExpertView
from octad.combine import build
from octad.combine.build import combine
from octad.combine.calibrate import gate_inputs
from octad.combine.mixture import MixtureSource
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe, SharedSpec
from octad.combine.refit import Refit, Sums, fit_and_choose, ridge
from octad.combine.together import combine_together
from octad.dist import World as Processes
from octad.errors import DataError, RecipeError
from octad.telling import quiet
from octad.text.windows import Window

PLAIN = {"method": "ridge", "tokens": 600}


_exact = exact(build)


# ---- the regression ------------------------------------------------------------------------------------------


def test_the_ridge_is_numpys_least_squares_with_rows_for_the_penalty() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 6) @ torch.randn(6, 6), torch.randn(30, 4)
    squares = x.square().sum(0)
    more = torch.diag((0.1 * squares + 1e-9 * squares.mean()).sqrt())
    expected, *_ = np.linalg.lstsq(
        torch.cat((x, more)).double().numpy(),
        torch.cat((y, torch.zeros(6, 4))).double().numpy(),
        rcond=None,
    )
    found = ridge(x.T @ x, x.T @ y, 0.1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def sums_of(x: torch.Tensor, y: torch.Tensor, held: torch.Tensor) -> Sums:
    sums = Sums(x.shape[1], y.shape[1])
    for part in (False, True):
        rows = held == part
        sums.add(part, x[rows], y[rows], torch.ones(int(rows.sum())))
    return sums


def test_a_linear_change_is_found_but_not_one_that_does_not_hold_elsewhere() -> None:
    torch.manual_seed(0)
    x, wanted = torch.randn(400, 8), torch.randn(5, 8)
    held = torch.arange(400) % 4 == 3
    found = sums_of(x, x @ wanted.T, held).change()
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    elsewhere = torch.where(held[:, None], -1.0, 1.0) * (x @ wanted.T)
    assert sums_of(x, elsewhere, held).change() is None


def test_without_text_to_choose_by_nothing_changes() -> None:
    x = torch.randn(20, 3)
    assert sums_of(x, x, torch.zeros(20, dtype=torch.bool)).change() is None


def test_weights_of_rows_count_as_copies_do() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    weighted, copied = Sums(3, 2), Sums(3, 2)
    weighted.add(False, x, y, torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0]))
    times = torch.tensor([1, 2, 1, 3, 1, 1])
    copied.add(False, x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), torch.ones(9))
    torch.testing.assert_close(weighted.gram, copied.gram)
    torch.testing.assert_close(weighted.cross, copied.cross)


def test_whole_documents_are_held_out() -> None:
    windows = [Window((1, 2), 1, document) for document in (0, 1, 2, 3, 3, 4, 0)]
    fitted, held = fit_and_choose(windows)
    assert [w.document for w in held] == [3, 3]
    assert [w.document for w in fitted] == [0, 1, 2, 4, 0]
    one = [Window((1, n), 1, 0) for n in range(5)]
    assert [w.ids[1] for w in fit_and_choose(one)[1]] == [3]
    assert fit_and_choose(one[:1]) == (one[:1], [])


# ---- algebra ---------------------------------------------------------------------------------------------------


def text(seed: int, windows: int = 40, length: int = 24) -> list[Window]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (windows, length), generator=draw)
    return [Window(tuple(row.tolist()), length - 1, n) for n, row in enumerate(ids)]


def lone(base: Path, member: Path) -> MixtureSource:
    """A mixture of one expert, on the base's attention."""
    entries = [{"name": n, "model": str(member), "data": [str(text_file(base, 1))]} for n in "ab"]
    plan = preflight(make_recipe(base, entries, top_k=1), measure=False)
    config = replace(plan.config, num_experts=1)
    return MixtureSource(config, plan.base, plan.members[:1], SharedSpec(), dtype=torch.float32)


def repaired(source: MixtureSource, texts: list[list[Window]]) -> set[str]:
    """Do it; the names of what changed."""
    with Refit(source, texts, torch.float32) as repair:
        for _ in gate_inputs(source, repair.runs, torch.float32, settle=repair.settle, refit=repair.refit):
            pass
    return set(source.settled)


def logits(source: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = load_model(source, torch.float32)
        return model.head(model.model(tokens))


def theirs(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(
            tokens
        ).logits


@pytest.mark.parametrize(
    ("family", "only"), [("llama", "self_attn"), ("qwen2", "o_proj"), ("qwen3", "_proj")]
)
def test_one_expert_becomes_its_member(tmp_path: Path, family: str, only: str) -> None:
    """Of which linear layers of attention are not in the mixture: what they give is a linear function of what goes in."""
    base = make_base(tmp_path / "base", family)
    member = full_member(base, tmp_path / "member", 1, only=only, scale=0.2)
    source, tokens = lone(base, member), torch.tensor([w.ids for w in text(7, 4)])
    expected = theirs(member, tokens)
    before = (logits(ExpertView(source, 0), tokens) - expected).norm()
    assert any("o_proj" in name for name in repaired(source, [text(1, 160)]))
    assert (logits(ExpertView(source, 0), tokens) - expected).norm() < 0.02 * before


def test_members_with_the_same_attention_stay_as_they_are(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    source = lone(base, full_member(base, tmp_path / "member", 1, only=".mlp."))
    assert repaired(source, [text(1)]) == set()


def test_the_last_layer_is_repaired_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    source = lone(base, full_member(base, tmp_path / "member", 1, only="v_proj", scale=0.3))
    last = source.config.num_hidden_layers - 1
    assert f"model.layers.{last}.self_attn.v_proj.weight" in repaired(source, [text(1, 120)])
    assert f"model.layers.{last}.self_attn.v_proj.weight" in source.settled


# ---- mixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("refit")
    base = make_base(directory / "base")
    models = [
        "base",
        adapter(base, directory / "one", 1, FFN + ATTENTION),
        full_member(base, directory / "two", 2, only="layers"),
    ]
    experts = [
        {"name": f"m{e}", "model": str(model), "data": [str(text_file(directory, e, 60))]}
        for e, model in enumerate(models)
    ]
    return base, experts


def mixture(world: tuple[Path, list[Any]], output: Path, **changes: Any) -> Path:
    recipe = make_recipe(world[0], world[1], **({"top_k": 1, "router": PLAIN} | changes))
    return combine(preflight(recipe, output), output)


@pytest.mark.parametrize("shared", ["base", "mean", "regmean"])
def test_experts_come_closer_to_their_members(
    world: tuple[Path, list[Any]], tmp_path: Path, shared: str
) -> None:
    """On text of the same kind that was not read: what transformers makes of the written mixtures."""
    plain = mixture(world, tmp_path / "plain", shared=shared)
    found = mixture(
        world, tmp_path / "found", shared=shared, repair={"method": "closed-form", "tokens": 2000}
    )
    record = json.loads((found / "octad.json").read_text())
    assert record["recipe"]["repair"] == {"method": "closed-form", "tokens": 2000}
    assert not any(expert["exact"] for expert in record["experts"])
    assert "closed-form repair" in record["experts"][2]["held"]["sentence"]
    source = text_file(tmp_path, 2, 80).read_text().splitlines()[60:]
    tokenizer = tokenizers.Tokenizer.from_file(str(world[0] / "tokenizer.json"))
    tokens = torch.tensor([tokenizer.encode(json.loads(line)["text"]).ids[:40] for line in source])
    expected = theirs(Path(world[1][2]["model"]), tokens)
    missed = [
        float((logits(ExpertView(open_source(path), 2), tokens) - expected).square().sum())
        for path in (plain, found)
    ]
    assert missed[1] < missed[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(found, dtype=torch.float32)
    assert model(tokens).logits.isfinite().all()


def test_exact_members_are_not_touched(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    experts = [
        {"name": "general", "model": "base", "data": [str(text_file(tmp_path, 1))]},
        {
            "name": "one",
            "model": str(adapter(base, tmp_path / "one", 1)),
            "data": [str(text_file(tmp_path, 2))],
        },
    ]
    recipe = make_recipe(base, experts, repair="closed-form")
    plan = preflight(recipe)
    assert "repair: closed-form changes nothing: every member is held exactly" in plan.notes
    assert [report.exact for report in plan.reports] == [True, True]
    ours = combine(plan, tmp_path / "repaired")
    plain = combine(preflight(make_recipe(base, experts)), tmp_path / "plain")
    expected = load_file(plain / "model.safetensors")
    for name, tensor in load_file(ours / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("method", ["prompts", "random"])
def test_it_works_with_routers_that_read_no_text(
    world: tuple[Path, list[Any]], tmp_path: Path, method: str
) -> None:
    experts = [expert | {"positive_prompts": ["a"]} for expert in world[1]]
    changes: dict[str, Any] = {"router": {"method": method}, "shared": "mean"}
    plain = mixture((world[0], experts), tmp_path / "plain", **changes)
    found = mixture((world[0], experts), tmp_path / "found", repair="closed-form", **changes)
    ours, before = (load_file(path / "model.safetensors") for path in (found, plain))
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, before[name])}
    assert any(".self_attn." in name for name in changed)
    assert all("self_attn" in name or ".w2." in name or ".gate." in name for name in changed)


def test_text_for_every_expert_is_needed() -> None:
    experts = [{"name": n, "model": "base"} for n in "ab"]
    raw = {"base": "b", "experts": experts, "router": {"method": "random"}, "repair": "closed-form"}
    with pytest.raises(
        RecipeError, match="repair: closed-form needs data for every expert; missing for a, b"
    ):
        Recipe.from_dict(raw, Path(), "recipe r")


def test_missing_text_is_told_at_once(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    experts = [expert | {"data": ["nowhere.jsonl"]} for expert in world[1]]
    changes: dict[str, Any] = {"router": {"method": "random"}, "repair": "closed-form"}
    with pytest.raises(DataError, match="nowhere"):
        mixture((world[0], experts), tmp_path / "out", **changes)


def test_many_processes_are_refused(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    plan = preflight(
        make_recipe(world[0], world[1], top_k=1, router=PLAIN, repair="closed-form"), measure=False
    )
    options: dict[str, Any] = {"overwrite": False, "max_shard_bytes": 1e9, "progress": quiet}
    with pytest.raises(RecipeError, match="repair: closed-form needs all members' text in one process"):
        combine_together(plan, tmp_path / "out", Processes(0, 2), **options)
