"""The Python API: its examples run as they are printed, its names are found, and importing it costs nothing."""

import asyncio
import doctest
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_text import world

import octad
from octad.report.table import Table

VERBS = (
    "check", "combine", "inspect", "evaluate", "edit_expert", "train", "branch", "export", "quantize", "init", "make",
    "schema", "LLM",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return world(tmp_path_factory.mktemp("api"))


def run_example(name: str) -> doctest.TestResults:
    """The example in the docstring of one of octad's names."""
    found = getattr(octad, name)
    verb = found._verb() if inspect.ismodule(found) else found
    test = next(t for t in doctest.DocTestFinder(recurse=False).find(verb, name, globs={"octad": octad}))
    return doctest.DocTestRunner(verbose=False).run(test)


def test_every_example_says_what_happens(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: what one makes, the next one uses."""
    monkeypatch.chdir(place)
    assert {name for name in octad.__all__ if name.islower() and name[0] != "_"} <= set(VERBS)
    for name in VERBS:
        tried = run_example(name)
        assert (name, tried.failed) == (name, 0)
        assert tried.attempted > 0
    for file in ("specialists/recipe.yaml", "mine/report/index.html", "one-alone/config.json"):
        assert (place / file).is_file()


def test_what_comes_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    heard: list[str] = []
    recipe = json.loads((place / "recipe.yaml").read_text())
    mixture = octad.combine(recipe, "again", progress=lambda stage, done: heard.append(stage))
    assert {"calibrating", "writing"} <= set(heard)
    assert Path(mixture) == (place / "again").resolve()
    assert mixture.to_dict()["experts"] == ["general", "one", "two"]
    heard.clear()
    texts = {"one": "one.jsonl", "two": ["two.jsonl"]}
    tell = lambda stage, done: heard.append(stage)  # noqa: E731
    verdict = octad.evaluate(mixture, texts, tokens=150, window=32, routing=True, progress=tell)
    assert {"judging", "routing"} <= set(heard)
    frame = verdict.to_pandas()
    assert list(frame.columns) == ["one", "two", "mean"]
    told = {c["name"]: c["bits_per_byte"]["two"] for c in verdict.report["contestants"]}
    assert dict(frame["two"]) == told
    table = verdict.table()
    assert isinstance(table, Table)
    html = verdict._repr_html_()
    assert html.count("<tr") == len(table.rows) + 1
    assert verdict.headline in html
    assert verdict.headline in " ".join(str(verdict).split())
    assert (verdict.save("page").parent / "report.md").is_file()
    llm = octad.LLM(mixture)
    assert repr(llm) == f"<LLM {mixture.path}, mixtral, 3 experts: general, one, two>"

    async def streamed() -> str:
        return "".join([d.text async for d in llm.astream("Once", params)])

    params = octad.SamplingParams(max_tokens=6, temperature=0)
    assert asyncio.run(streamed()) == llm.generate("Once", params)[0].outputs[0].text


def test_four_bits_are_rounded_for_the_mixtures_own_text_or_for_what_is_given(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    mixture = octad.combine(json.loads((place / "recipe.yaml").read_text()), "rounded-from")
    options = {"nearest": ("int8", None), "own": ("int4", None), "given": ("int8", {"one": "one.jsonl"})}
    for name, (bits, calibrate) in options.items():
        path = Path(octad.quantize(mixture, name, bits, calibrate=calibrate))
        assert ("tokens of text (GPTQ)" in (path / "README.md").read_text()) == (name != "nearest")


def test_names() -> None:
    assert set(octad.__all__) <= set(dir(octad))
    assert octad.__version__.count(".") == 2
    assert "recipe" in inspect.signature(octad.combine).parameters
    from octad.combine.recipe import Recipe  # rooms are still packages

    assert (
        Recipe.of({"base": "b", "experts": [{"name": n, "model": "base", "data": "x"} for n in "ab"]}).base
        == "b"
    )
    with pytest.raises(AttributeError, match="has no attribute 'combien'"):
        _ = octad.combien
    with pytest.raises(octad.OctadError, match="nothing to judge on"):
        octad.evaluate("nowhere")


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "('torch', 'pydantic', 'numpy', 'rich')"
    code = f"import sys, octad; dir(octad); sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
