"""octad demo --base on a tiny model: the whole road, an interruption, and what is refused."""

import ast
import gc
import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers
from members import make_base
from own_text import folders
from safetensors.torch import load_file
from tiny_models import Octad
from vocabularies import smollm2

from octad.combine.calibration import text_windows
from octad.combine.recipe import ExpertSpec, Recipe, RouterSpec
from octad.demo import own_base
from octad.demo.demo_cost import factor_bytes, rank_within
from octad.demo.specialist_texts import CHATS, DATA, KINDS, shipped, texts_in
from octad.model.config import ModelConfig
from octad.text.corpus import open_all
from octad.text.documents import read_documents
from octad.train.trainer import Trainer


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and mine/ with text for law (a folder) and sea (a file)."""
    torch.set_num_threads(1)
    place = folders(tmp_path_factory.mktemp("demo-base"))
    (place / "mine").mkdir()
    shutil.copytree(place / "texts" / "law", place / "mine" / "law")
    rows = [json.dumps({"text": path.read_text()}) for path in sorted((place / "texts/sea").iterdir())]
    (place / "mine" / "sea.jsonl").write_text("\n".join(rows))
    return place


@pytest.fixture
def quick(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """There, with little to fit and judge on."""
    monkeypatch.chdir(own)
    monkeypatch.setattr(own_base, "JUDGED", own_base.JUDGED | {"quick": (60, 32)})
    monkeypatch.setattr(own_base, "ROUTER_TOKENS", 200)
    return own


DEMO = ("demo", "--base", "base", "--text", "mine", "--steps", 3)


def adapters(place: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: load_file(place / "specialists" / name / "adapter_model.safetensors") for name in ("law", "sea")
    }


def test_one_base_becomes_a_judged_mixture_once(quick: Path, octad: Octad) -> None:
    code, out, err = octad(*DEMO, "-o", "whole")
    assert (code, err.count("Traceback")) == (0, 0), err
    said = " ".join(out.split())
    for part in (
        "law and sea: a specialist each, 3 steps",
        "Room needed",
        "Is it better",
        "Three things to try",
    ):
        assert part in said
    whole = quick / "whole"
    assert [e.name for e in Recipe.load(whole / "recipe.yaml").experts] == ["general", "law", "sea"]
    assert "int8" in (whole / "report/report.json").read_text()
    assert transformers.AutoConfig.from_pretrained(whole / "mixture").num_local_experts == 3
    made = peft.PeftConfig.from_pretrained(str(whole / "specialists" / "law"))
    assert set(made.target_modules) == {"gate_proj", "up_proj", "down_proj"}
    code, _, err = octad(*DEMO, "-o", "whole")
    assert (code, "done before: law, sea" in err, "step 3" in err) == (0, True, False)
    code, _, err = octad(*DEMO[:-1], 4, "-o", "whole")
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun with something else for steps" in err


def test_what_was_interrupted_goes_on_to_the_same_weights(
    quick: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = Trainer.train_step, []

    def interrupted(self: Trainer, *rest: object) -> object:
        taken.append(self.run.name)
        if taken.count("law") == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        code, _, err = octad(*DEMO, "-o", "cut", "--judge", "none")
    assert (code, "the same command goes on" in err) == (130, True)
    assert not (quick / "cut" / "mixture").exists()
    code, _, err = octad(*DEMO, "-o", "cut", "--judge", "none")
    assert (code, "law: resuming" in err) == (0, True)
    assert not (quick / "cut" / "report").exists()
    if not (quick / "whole").exists():
        octad(*DEMO, "-o", "whole", "--judge", "none")
    once, again = adapters(quick / "whole"), adapters(quick / "cut")
    assert all(torch.equal(once[n][key], again[n][key]) for n in once for key in once[n])


def test_one_model_is_in_memory_at_a_time(quick: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trained holds itself in circles; each stayed until Python happened to look for garbage."""
    held: list[int] = []
    begin = Trainer.__init__

    def watched(self: Trainer, *rest: object) -> None:
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        held.append(sum(t.nbytes for t in tensors if t.device.type == "cpu"))
        begin(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        code, _, err = octad(*DEMO, "-o", "light", "--judge", "none")
    finally:
        gc.enable()
    assert (code, len(held)) == (0, 3), err  # the step that is measured, law, sea
    assert held[2] <= held[1] * 1.01, held


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text", "mine"), "--text is for a base of your own; give --base MODEL"),
        (("--base", "nowhere"), "nowhere"),
        (("--base", "base", "--text", "base/config.json"), "is no folder"),
        (("--base", "base", "--text", "empty"), "found text for 0 specialists, expected 1 to 63"),
        (("--base", "base", "--text", "many"), "found text for 64 specialists, expected 1 to 63"),
        (("--base", "base", "--text", "twice"), "law.jsonl and law.txt are both for law"),
        (("--base", "base", "--text", "blank"), "law.txt: has 0 different documents"),
        (("--base", "base", "--minutes", "1", "--steps", "1"), "give one"),
        (("--base", "base", "--minutes", "0"), "give a time above 0"),
        (("--base", "base", "--judge", "twice"), "there are quick, full, none"),
        (("--base", "moe"), "is a mixture; give a dense model"),
        (("--base", "odd"), "gpt2"),
        (("--base", "biased"), "biases in its feed-forward networks"),
        (("--base", "base", "-o", "mine"), "did not make"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line_and_leave_nothing(
    own: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(own)
    for name, files in (
        ("empty", ()),
        ("many", [f"n{n}.txt" for n in range(64)]),
        ("twice", ("law.jsonl", "law.txt")),
        ("blank", ("law.txt",)),
    ):
        (own / name).mkdir(exist_ok=True)
        for file in files:
            (own / name / file).touch()
    if not (own / "moe").exists():
        make_base(own / "moe", "mixtral")
        make_base(own / "biased", "llama", mlp_bias=True)
        transformers.GPT2Config().save_pretrained(own / "odd")
    before = sorted(os.listdir())
    code, _, err = octad("demo", *options)
    assert (code, err.count("\n"), err.startswith("octad: ")) == (2, 1, True), err
    assert said in err
    assert sorted(os.listdir()) == before


def test_a_full_disk_is_seen_before_work(own: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    monkeypatch.setattr(own_base.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 1))  # type: ignore[attr-defined]
    code, _, err = octad(*DEMO, "-o", "full")
    assert (code, "too little room" in err, (own / "full").exists()) == (2, True, False)


def test_adapters_of_half_a_billion_parameters_stay_under_forty_megabytes() -> None:
    """Counted by peft on a model of that shape, two of its 24 layers."""
    shape = {
        "vocab_size": 64, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    }  # fmt: skip
    config = transformers.Qwen2Config(**shape)
    ours = ModelConfig.from_dict(shape | {"model_type": "qwen2", "num_hidden_layers": 24})
    rank = rank_within(ours, 7)
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
        lora = peft.LoraConfig(r=rank, target_modules=["gate_proj", "up_proj", "down_proj"])
        learning, _ = peft.get_peft_model(model, lora).get_nb_trainable_parameters()
    assert rank * factor_bytes(ours) == 4 * learning * 12
    assert 30e6 < 7 * 4 * learning * 12 < 40e6


@pytest.mark.parametrize("plain", [True, False])
def test_what_comes_with_octad_serves_bases_with_and_without_a_template(tmp_path: Path, plain: bool) -> None:
    found = shipped(tmp_path, plain=plain)
    assert found.specialists == list(KINDS)
    kinds = set()
    for name, files in found.learnt.items():
        learnt = [d for part in open_all(files) for d in part.read("text", None)]
        judged = list(read_documents(Path(found.held_out[name])))
        assert len(learnt) >= 30
        assert not [d for d in judged if d in learnt]
        kinds |= {type(d) for d in learnt}
    assert kinds == ({str} if plain else {str, list})


def rows(name: str, file: str) -> list[dict[str, str]]:
    path = DATA / name / file
    text = gzip.decompress(path.read_bytes()).decode() if file.endswith(".gz") else path.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["sql", "french", "german", "spanish", "literature"])
def test_what_specialists_read_besides_is_of_the_listed_works_and_not_judged_on(name: str) -> None:
    kinds = [*KINDS, "general"]
    judged = {row["source"].partition("/")[2] for kind in kinds for row in rows(kind, "heldout.jsonl")}
    listed = {
        (row["source"].partition("/")[0], row["licence"])
        for file in ("calibrate.jsonl", "heldout.jsonl")
        for row in rows(name, file)
    }
    more = rows(name, "more.jsonl.gz")
    assert sum(len(row["text"]) for row in more) > 200_000
    for row in more:
        work, _, document = row["source"].partition("/")
        assert (work, row["licence"]) in listed
        assert (
            not {document, document.replace("_gut_f", "_gut"), document.replace("_gut/", "_gut_f/")} & judged
        )
        assert "copyright" not in row["text"].lower()


def test_sql_is_licensed_and_judged_on_other_works() -> None:
    listed = (DATA / "LICENCES.md").read_text("utf-8")
    fitted, judged = rows("sql", "calibrate.jsonl"), rows("sql", "heldout.jsonl")
    for row in fitted + judged:
        assert f"`{row['source'].split('/', 1)[1]}`" in listed
    dialects = {row["source"].rsplit("/", 1)[0] for row in fitted}
    assert not dialects & {row["source"].rsplit("/", 1)[0] for row in judged}


def test_python_is_the_bases_own(tmp_path: Path) -> None:
    """Nobody learns it, and the routers know whose it is."""
    found = shipped(tmp_path, plain=False)
    assert "python" not in found.specialists
    assert str(DATA / "python" / "calibrate.jsonl") in found.learnt["general"]


def test_much_of_what_shows_the_generalist_is_python_as_it_is_asked_for(tmp_path: Path) -> None:
    """Beside conversations, which are longer. Where no function with examples was among it, routers took HumanEval's for
    maths, whose text has examples of that form (docs/demo.md)."""
    tokenizer, budget = smollm2(), RouterSpec(tokens=own_base.ROUTER_TOKENS)
    files = [str(DATA / CHATS), *shipped(tmp_path, plain=False).learnt["general"]]
    windows = text_windows(ExpertSpec(name="general", model="base"), files, budget, tokenizer)
    functions = [row["text"] for row in rows("python", "functions.jsonl.gz")]
    python = functions + [row["text"] for row in rows("python", "calibrate.jsonl")]
    total = sum(len(window.ids) for window in windows)
    for documents, share in ((python, 0.4), (functions, 0.2)):
        shown = [len(w.ids) for w in windows if any(tokenizer.decode(w.ids) in text for text in documents)]
        assert sum(shown) > share * total


def test_functions_with_examples_are_of_the_listed_works_and_not_judged_on() -> None:
    judged = {row["source"].partition("/")[2] for row in rows("python", "heldout.jsonl")}
    licences = {
        (row["source"].partition("/")[0], row["licence"]) for row in rows("python", "calibrate.jsonl")
    }
    listed = (DATA / "LICENCES.md").read_text("utf-8")
    for row in rows("python", "functions.jsonl.gz"):
        work, _, document = row["source"].partition("/")
        assert (work, row["licence"]) in licences
        assert document not in judged
        assert f"`{document}`" in listed
        assert not [word for word in ("copyright", "licen") if word in row["text"].lower()]
        (function,) = ast.parse(row["text"]).body
        assert isinstance(function, ast.FunctionDef)
        assert ">>>" in (ast.get_docstring(function) or "")


def test_a_folder_may_bring_its_own_generalist(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own / "mine", tmp_path / "mine")
    ours = texts_in(tmp_path / "mine", tmp_path / "x", plain=True)
    assert list(ours.learnt) == ["general", "law", "sea"]
    assert list(ours.held_out) == ["general"]
    shutil.copy(own / "mine" / "sea.jsonl", tmp_path / "mine" / "general.jsonl")
    theirs = texts_in(tmp_path / "mine", tmp_path / "y", plain=True)
    assert theirs.learnt["general"] == [str(tmp_path / "mine" / "general.jsonl")]
    assert (theirs.held_out, (tmp_path / "y").exists()) == ({}, False)
