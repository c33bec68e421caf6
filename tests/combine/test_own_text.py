"""Text that an expert writes before its router is fitted: what it begins with, what joins its text, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from members import adapter, make_base, make_recipe, text_file

from octad.api.interviewing import interview
from octad.combine import own_text
from octad.combine.own_text import LENGTH, beginnings, check
from octad.combine.preflight import Plan, preflight
from octad.combine.recipe import Recipe
from octad.errors import RecipeError

TOKENS, WRITES = 400, 150


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_base(tmp_path_factory.mktemp("own") / "base")


def recipe_with(base: Path, directory: Path, general: int, other: int, **router: Any) -> Recipe:
    directory.mkdir(exist_ok=True)
    model = str(adapter(base, directory / "other", 1))
    experts = [
        {"name": "general", "model": "base", "data": [str(text_file(directory, 1))], "writes": general},
        {"name": "other", "model": model, "data": [str(text_file(directory, 2))], "writes": other},
    ]
    return make_recipe(base, experts, top_k=1, router={"method": "ridge", "tokens": TOKENS} | router)


def ids_of(plan: Plan, number: int) -> list[tuple[int, ...]]:
    return [window.ids for window in plan.calibrations[number].windows]


def test_what_it_writes_joins_its_text(base: Path, tmp_path: Path) -> None:
    plan = preflight(recipe_with(base, tmp_path, 0, WRITES), measure=False)
    before, untouched = ids_of(plan, 1), ids_of(plan, 0)
    begun = beginnings(plan, 1, WRITES)
    seen: list[tuple[str, float]] = []
    interview(plan, lambda stage, done: seen.append((stage, done)))
    assert seen[-1] == ("other writes", 1.0)
    assert ids_of(plan, 0) == untouched
    after = ids_of(plan, 1)
    kept = [ids for ids in after if ids in before]
    written = [ids for ids in after if ids not in before]
    assert kept == before[: len(kept)]
    assert sum(map(len, after)) <= TOKENS
    assert 0.6 * WRITES <= sum(map(len, written)) <= WRITES
    firsts = {plan.tokenizer.decode(ids) for ids in begun}
    texts = [plan.tokenizer.decode(ids) for ids in written]
    assert all(any(text.startswith(first) for first in firsts) for text in texts)
    again = preflight(recipe_with(base, tmp_path, 0, WRITES), measure=False)
    interview(again, lambda stage, done: None)
    assert ids_of(again, 1) == after


def test_texts_begin_as_lines_do(base: Path, tmp_path: Path) -> None:
    plan = preflight(recipe_with(base, tmp_path, 0, WRITES), measure=False)
    begun = beginnings(plan, 1, WRITES)
    assert len(begun) == -(-WRITES // LENGTH)
    starts = {
        tuple(window.ids[i : i + len(ids)])
        for ids in begun
        for window in plan.calibrations[1].windows
        for i in own_text._line_starts(plan, window.ids)
    }
    assert all(tuple(ids) in starts for ids in begun)
    assert {len(ids) for ids in begun} <= set(own_text.GIVEN)


def test_who_may_not_write(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expert 'general': writes: the base writes text of every kind"):
        check(preflight(recipe_with(base, tmp_path, WRITES, 0), measure=False))
    with pytest.raises(RecipeError, match=r"'other': writes is for router methods that read text.*'random'"):
        recipe_with(base, tmp_path, 0, WRITES, method="random")
    with pytest.raises(RecipeError, match="'other': writes 401 tokens, but router: tokens is 400"):
        recipe_with(base, tmp_path, 0, TOKENS + 1)
