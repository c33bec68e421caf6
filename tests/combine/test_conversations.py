"""Questions that an expert answers before its router is fitted: what joins the text, how much of it, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from members import adapter, make_base, make_recipe, text_file
from tiny_chat import TEMPLATE

from octad.api.interviewing import interview
from octad.combine.conversations import asked, check, holds_conversations
from octad.combine.preflight import Plan, preflight
from octad.combine.recipe import Recipe
from octad.errors import DataError, RecipeError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = make_base(tmp_path_factory.mktemp("talk") / "base")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": TEMPLATE + "<|end|>"})
    )
    return directory


def recipe_with(base: Path, directory: Path, questions: Any, **router: Any) -> Recipe:
    directory.mkdir(exist_ok=True)
    experts = [
        {"name": "general", "model": "base", "data": [str(text_file(directory, 1))], "questions": questions},
        {
            "name": "other",
            "model": str(adapter(base, directory / "other", 1)),
            "data": [str(text_file(directory, 2))],
        },
    ]
    return make_recipe(base, experts, top_k=1, router={"method": "ridge"} | router)


def spelled(plan: Plan, number: int) -> list[str]:
    return [plan.tokenizer.decode(w.ids) for w in plan.calibrations[number].windows]


def test_the_answers_join_the_text(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("Who is it?\n\n  Where?  \n")
    plan = preflight(recipe_with(base, tmp_path, [str(file)], tokens=400, window=200), measure=False)
    before = spelled(plan, 0)
    assert not holds_conversations(plan, 0)
    seen: list[tuple[str, float]] = []
    interview(plan, lambda stage, done: seen.append((stage, done)))
    assert seen[-1] == ("general answers", 1.0)
    assert holds_conversations(plan, 0)
    chats = [text for text in spelled(plan, 0) if text not in before]
    assert len(chats) == 2
    assert chats[0].startswith("<user>Who is it?\n<assistant>")
    assert chats[1].startswith("<user>Where?\n<assistant>")
    assert plan.calibrations[0].tokens <= 400
    assert set(spelled(plan, 0)) - set(chats) <= set(before)


def test_conversations_take_half_of_the_budget_at_most(base: Path, tmp_path: Path) -> None:
    plan = preflight(recipe_with(base, tmp_path, "octad", tokens=120, window=60), measure=False)
    questions = next(iter(asked(plan.recipe)))[1]
    assert len(questions) == len(set(questions)) == 96
    interview(plan, lambda stage, done: None)
    chats = [w for w in plan.calibrations[0].windows if plan.tokenizer.decode(w.ids).startswith("<user>")]
    assert 0 < sum(len(w.ids) for w in chats) <= 60
    assert plan.calibrations[0].tokens <= 120


def test_a_generalist_without_conversations_is_told(base: Path, tmp_path: Path) -> None:
    silent = preflight(recipe_with(base, tmp_path, ()), measure=False)
    check(silent)
    assert [any("no conversation" in note for note in r.notes) for r in silent.reports] == [True, False]
    asking = preflight(recipe_with(base, tmp_path / "a", "octad"), measure=False)
    check(asking)
    assert not any("no conversation" in note for r in asking.reports for note in r.notes)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    plan = preflight(recipe_with(base, tmp_path, [str(tmp_path / "none.txt")]), measure=False)
    with pytest.raises(DataError, match=r"none\.txt: questions cannot be read"):
        check(plan)
    (tmp_path / "empty.txt").write_text(" \n")
    plan = preflight(recipe_with(base, tmp_path / "a", [str(tmp_path / "empty.txt")]), measure=False)
    with pytest.raises(DataError, match="holds no question"):
        check(plan)
    untaught = make_base(tmp_path / "untaught")
    plan = preflight(recipe_with(untaught, tmp_path / "b", "octad"), measure=False)
    with pytest.raises(RecipeError, match="expert 'general': questions: the model has no chat template"):
        check(plan)


def test_a_generalist_that_is_not_there_is_not_favoured(base: Path, tmp_path: Path) -> None:
    experts = [
        {
            "name": f"m{n}",
            "model": str(adapter(base, tmp_path / f"m{n}", n)),
            "data": [str(text_file(tmp_path, n))],
        }
        for n in (1, 2)
    ]
    with pytest.raises(RecipeError, match="generalist 2: no expert's model is base"):
        check(preflight(make_recipe(base, experts, top_k=1, router={"generalist": 2}), measure=False))
