"""shared: auto: what is measured, against transformers; which is taken, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from members import (
    ATTENTION,
    FFN,
    adapter,
    edit_config,
    exact,
    full_member,
    make_base,
    make_recipe,
    text_file,
)

from octad.combine import build, choose
from octad.combine.build import combine
from octad.combine.choose import Held, alone, decide, difference, held_texts, own_nats
from octad.combine.preflight import opened, preflight
from octad.combine.recipe import Recipe, SharedSpec
from octad.errors import RecipeError
from octad.text.windows import Window

_exact = exact(build, choose)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    directory = tmp_path_factory.mktemp("auto")
    base = make_base(directory / "base")
    models = [
        "base",
        adapter(base, directory / "one", 1, FFN + ATTENTION),
        full_member(base, directory / "two", 2, scale=0.2),
    ]
    experts = [
        {"name": f"m{e}", "model": str(model), "data": [str(text_file(directory, e, 30))]}
        for e, model in enumerate(models)
    ]
    return base, experts


def model_of(directory: str | Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def loss(model: Any, windows: list[Window]) -> float:
    """The sum of -ln p of everything but each window's first token, as transformers has it."""
    with torch.no_grad():
        parts = [
            float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            for ids in (torch.tensor([w.ids]) for w in windows)
        ]
    return sum(parts)


def test_what_is_measured_is_what_transformers_measures(world: tuple[Path, list[Any]]) -> None:
    base, experts = world
    plan = opened(make_recipe(base, experts, shared="auto"))
    texts = held_texts(plan)
    assert all(text.judging and text.seen for text in texts)
    assert not any(w in text.seen for text in texts for w in text.judging)
    whole = model_of(experts[2]["model"])
    own = own_nats(alone(plan, 2), [texts[2]], torch.float32)[0]
    assert float(own[:, 0].sum()) == pytest.approx(loss(whole, texts[2].judging), rel=1e-4)
    assert float(own[:, 1].sum()) == sum(len(w.ids) - 1 for w in texts[2].judging)
    with_bases_attention = model_of(base)
    state = with_bases_attention.state_dict()
    state |= {name: value for name, value in whole.state_dict().items() if ".mlp." in name}
    with_bases_attention.load_state_dict(state)
    found = own_nats(plan.source(SharedSpec(method="base")), texts, torch.float32)[2]
    expected = loss(with_bases_attention, texts[2].judging)
    assert float(found[:, 0].sum()) == pytest.approx(expected, rel=1e-4)


def test_regmean_is_judged_on_text_that_it_has_not_seen(world: tuple[Path, list[Any]]) -> None:
    plan = opened(make_recipe(world[0], world[1], shared="auto"))
    texts = held_texts(plan)
    spec = SharedSpec(method="regmean")
    found = own_nats(plan.source(spec), texts, torch.float32)
    swapped = [Held(text.seen[:2], text.judging) for text in texts]
    other = own_nats(plan.source(spec), swapped, torch.float32)
    assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(found, other, strict=True))
    assert not torch.equal(found[2], other[2])


def nats(*values: float, counts: float = 10.0) -> torch.Tensor:
    return torch.tensor([[value, counts] for value in values])


def test_a_difference_and_its_error_by_hand() -> None:
    """Two experts: 0.1 nats a token less, and 0.3 less; the windows of the first differ by 1 from their mean, each
    way."""
    ours = [nats(19.0, 17.0), nats(27.0, 27.0)]
    theirs = [nats(19.0, 19.0), nats(30.0, 30.0)]
    value, error = difference(ours, theirs)
    assert value == pytest.approx(-(0.1 + 0.3) / 2)
    assert error == pytest.approx((2 * 2 / 1) ** 0.5 / 20 / 2)


def test_the_best_is_taken_where_it_is_better_for_certain() -> None:
    base = [nats(20.0, 20.5, 19.5, 20.0)]
    assert decide({"base": base, "mean": [nats(19.0, 19.5, 18.5, 19.1)], "ties": base}) == "mean"
    assert decide({"base": base, "mean": [nats(12.0, 27.5, 19.0, 20.0)]}) == "base"
    assert decide({"base": base, "mean": [nats(21.0, 21.0, 21.0, 21.0)]}) == "base"


def test_a_mixture_records_what_was_taken_and_the_plan_says_why(
    world: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    plan = preflight(make_recipe(world[0], world[1], shared="auto"), tmp_path / "out")
    (why,) = [note for note in plan.notes if note.startswith("shared: auto: ")]
    chosen = why.split(": ")[2]
    assert chosen == plan.recipe.shared.method in choose.CANDIDATES
    assert all(f"{name} " in why for name in choose.CANDIDATES)
    path = combine(plan, tmp_path / "out")
    assert json.loads((path / "octad.json").read_text())["recipe"]["shared"]["method"] == chosen


def test_members_with_the_bases_attention_need_no_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    experts = [
        {"name": n, "model": str(adapter(base, tmp_path / n, e)), "data": [str(text_file(tmp_path, e))]}
        for e, n in enumerate("ab")
    ]
    monkeypatch.setattr(choose, "own_nats", None)
    plan = preflight(make_recipe(base, experts, shared="auto"))
    assert plan.recipe.shared.method == "base"
    assert any("every member's attention, norms and embeddings are the base's" in note for note in plan.notes)


def test_other_positions_cannot_be_averaged(world: tuple[Path, list[Any]], tmp_path: Path) -> None:
    far = full_member(world[0], tmp_path / "far", 4)
    edit_config(far, rope_theta=5000.0, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    experts = [*world[1], world[1][0] | {"name": "far", "model": str(far)}]
    plan = preflight(make_recipe(world[0], experts, shared="auto"))
    assert plan.recipe.shared.method == "base"
    assert any("cannot be averaged" in note for note in plan.notes)


def test_text_for_every_expert_is_needed() -> None:
    experts = [{"name": n, "model": "base"} for n in "ab"]
    raw = {"base": "b", "experts": experts, "router": {"method": "random"}, "shared": "auto"}
    with pytest.raises(RecipeError, match="shared: auto needs data for every expert; missing for a, b"):
        Recipe.from_dict(raw, Path(), "recipe r")
