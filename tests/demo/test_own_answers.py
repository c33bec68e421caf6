"""What a base answers before specialists branch off it: whole answers alone, and each once."""

import json
import shutil
from pathlib import Path

import pytest
from own_text import folders
from tiny_chat import TEMPLATE
from tiny_models import Octad

from octad.combine.recipe import Recipe
from octad.demo import own_answers, own_base
from octad.demo.own_answers import ANSWERS, up_to_an_end
from octad.train.run_config import load_branch


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("It is Rome.\nRome is", "It is Rome."),
        ("Use a loop:\n```python\nfor x in y:", ""),
        ("Use it:\n```\nx = 1\n```\nThe first line", "Use it:\n```\nx = 1\n```"),
        ("One.\n```\na.\nb", "One."),
        ("no end", ""),
    ],
)
def test_an_answer_that_was_cut_ends_where_a_line_does(text: str, kept: str) -> None:
    assert up_to_an_end(text) == kept


def test_a_base_with_a_template_is_asked_first(
    tmp_path: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are the generalist's text, and a share of every specialist's; the same command asks once."""
    place = folders(tmp_path)
    settings = place / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    asked: list[str] = []

    def counted() -> list[str]:
        asked.append("once more")
        return [f"What is {letter}?" for letter in "abcdefgh"]

    monkeypatch.chdir(place)
    monkeypatch.setattr(own_answers, "bundled_questions", counted)
    monkeypatch.setattr(own_answers, "LONGEST", 64)
    monkeypatch.setattr(own_base, "ROUTER_TOKENS", 200)
    shutil.rmtree(place / "texts" / "sea")
    (place / "texts" / "sky.csv").unlink()
    demo = ("demo", "--base", "base", "--text", "texts", "--steps", 2, "--judge", "none", "-o", "made")
    code, out, err = octad(*demo)
    assert code == 0, err
    assert "the base answers questions, about" in " ".join(out.split())
    rows = [json.loads(line)["messages"] for line in (place / "made" / ANSWERS).read_text().splitlines()]
    assert 1 <= len(rows) <= 8
    assert {turn["role"] for turns in rows for turn in turns} == {"user", "assistant"}
    recipe = Recipe.load(place / "made" / "recipe.yaml")
    assert list(recipe.experts[0].data) == [ANSWERS, "text/general/train.jsonl"]
    branch = load_branch(place / "made" / "branch.yaml")
    assert branch.keep is not None
    assert (branch.keep.data, branch.keep.share) == ((ANSWERS,), 0.25)
    assert [s.name for s in branch.data_of(branch.experts[0]).sources] == ["law", "law: kept"]
    assert (octad(*demo)[0], asked) == (0, ["once more"])
