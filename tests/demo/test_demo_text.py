"""The demonstration's text: what is fitted on is not judged on, every source is licensed, and it holds conversations."""

import json
from pathlib import Path
from typing import Any

import pytest

from octad.combine.recipe import Recipe
from octad.demo.demo import HERE
from octad.evaluate.tasks.catalogue import find_task
from octad.evaluate.tasks.task import ChatTask
from octad.evaluate.tasks.which_language import language_of

NOTICES = {"Apache-2.0": "Apache-2.0.txt", "MPL-2.0": "MPL-2.0.txt", "WordNet-3.0": "WordNet-3.0.txt"}
RECIPE = Recipe.load(HERE / "recipe.yaml")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fitted_on(name: str) -> list[dict[str, Any]]:
    spec = next(spec for spec in RECIPE.experts if spec.name == name)
    return [row for file in spec.data for row in rows(Path(RECIPE.resolve(file)))]


NAMES = [spec.name for spec in RECIPE.experts]


@pytest.mark.parametrize("name", NAMES)
def test_no_document_is_fitted_on_and_judged_on(name: str) -> None:
    fitted, judged = fitted_on(name), rows(HERE / "data" / name / "heldout.jsonl")
    of_works = {row["source"] for row in fitted if row["source"] != "octad"}
    assert not of_works & {row["source"] for row in judged}
    assert len(fitted) >= 35  # many short ones
    assert max(len(row.get("text", "")) for row in fitted) < 2000


@pytest.mark.parametrize("name", NAMES)
def test_every_work_is_in_the_list_of_licences(name: str) -> None:
    listed = (HERE / "data" / "LICENCES.md").read_text(encoding="utf-8")
    for row in fitted_on(name) + rows(HERE / "data" / name / "heldout.jsonl"):
        if row["source"] != "octad":
            assert f"`{row['source'].split('/', 1)[1]}`" in listed, row["source"]
        if row["licence"] in NOTICES:
            assert (HERE / "data" / "licences" / NOTICES[row["licence"]]).is_file()


def test_conversations_are_in_the_language_of_their_expert() -> None:
    for name, language in (("general", "en"), ("french", "fr"), ("german", "de"), ("spanish", "es")):
        chats = [row["messages"] for row in fitted_on(name) if "messages" in row]
        assert len(chats) >= 12
        told = [language_of(message["content"]) for chat in chats for message in chat]
        assert set(told) <= {language, None}
        assert told.count(language) > len(told) / 2


def test_the_questions_of_the_task_were_not_fitted_on() -> None:
    task = find_task("octad-chat")
    assert isinstance(task, ChatTask)
    chats = [row["messages"] for name in NAMES for row in fitted_on(name) if "messages" in row]
    asked = {message["content"] for chat in chats for message in chat if message["role"] == "user"}
    assert not asked & {example.question for example in task.examples}
