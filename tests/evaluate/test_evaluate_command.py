"""octad evaluate as a user runs it, on tiny models: requirements and exit codes, report, card, bad mixtures."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from judging import World
from safetensors.torch import load_file, save_file
from tiny_models import Octad, Outcome


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("commanded"), "llama")


@pytest.fixture
def mixture(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.mixture, tmp_path / "mixture"))


@pytest.fixture
def evaluate(world: World, octad: Octad) -> Octad:
    """evaluate(model, "--require", "mean<=soup") -> (exit code, stdout, stderr)."""
    data = world.base.parent / "domains.yaml"
    data.write_text(yaml.safe_dump({"domains": {d: [str(f) for f in fs] for d, fs in world.domains.items()}}))

    def run(model: Path, *options: object) -> Outcome:
        return octad("evaluate", model, "--data", data, "--tokens", 100, "--window", 32, *options)

    return run


def test_requirements_decide_the_exit_code(mixture: Path, evaluate: Octad) -> None:
    code, out, _ = evaluate(mixture, "--require", "mean<=100, every<=member*100, one<200")
    assert code == 0
    assert out.count(": true") == 3
    code, out, _ = evaluate(mixture, "--require", "mean<=100, every<=member*0.001")
    assert code == 1
    assert "every<=member*0.001: untrue (2 of 2 domains)" in " ".join(out.split())
    code, out, _ = evaluate(mixture, "--require", "mean<=soup*0.001", "--json")
    assert code == 1
    (entry,) = json.loads(out)["requirements"]
    assert entry["holds"] is False
    assert entry["cases"][0]["left_value"] > entry["cases"][0]["right_value"] > 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mean=oracle", "character 5"),
        ("welsh<=oracle", "'welsh'"),
        ("mean<=dense qwen", "'dense qwen'"),
        ("", "is empty"),
        (" ", "character 2"),
    ],
)
def test_requirements_that_make_no_sense(mixture: Path, evaluate: Octad, text: str, part: str) -> None:
    code, out, err = evaluate(mixture, "--require", text)
    assert (code, out) == (2, "")
    assert err.startswith("octad: --require")
    assert part in err
    assert err.count("\n") == 1


def test_a_dense_model_has_no_oracle(world: World, evaluate: Octad) -> None:
    code, _, err = evaluate(world.base, "--require", "mean<=oracle")
    assert code == 2
    assert "dense" in err
    code, out, _ = evaluate(world.base, "--require", "mean<=100", "--dense", world.models["far"])
    assert code == 0
    (row,) = [line for line in out.splitlines() if line.startswith("dense far")]
    assert "better" in row or "worse" in row or "unclear" in row or "as good" in row
    assert "dense model" in out


def test_dense_models_read_the_same_tokens(world: World, evaluate: Octad, tmp_path: Path) -> None:
    from members import save_tokenizer

    other = Path(shutil.copytree(world.base, tmp_path / "other"))
    save_tokenizer(other, swap=True)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    core = json.loads((other / "tokenizer.json").read_text())
    vocabulary = core["model"]["vocab"]
    vocabulary[alphabet[0]], vocabulary[alphabet[4]] = vocabulary[alphabet[4]], vocabulary[alphabet[0]]
    (other / "tokenizer.json").write_text(json.dumps(core))
    code, _, err = evaluate(world.mixture, "--dense", other, "--no-card")
    assert code == 2
    assert "same tokens" in err


def test_the_card_of_a_mixture_and_of_nothing_else(mixture: Path, world: World, evaluate: Octad) -> None:
    before = (mixture / "README.md").read_text()
    assert evaluate(mixture, "--no-card")[0] == 0
    assert (mixture / "README.md").read_text() == before
    code, out, _ = evaluate(mixture)
    assert code == 0
    assert "wrote the verdict into" in out
    card = (mixture / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert card.count("## Verdict") == 1
    evaluate(mixture)
    assert (mixture / "README.md").read_text() == card
    evaluate(world.base)
    assert not (world.base / "README.md").exists()
    assert [p.name for p in mixture.iterdir() if p.name.startswith(".")] == []


def test_the_report_gets_the_dict_and_the_routing(
    mixture: Path, evaluate: Octad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call sites alone: stand-ins for the page and for the routing."""
    written: list[dict[str, Any]] = []
    page, routing = ModuleType("octad.report.files"), ModuleType("octad.evaluate.routing")

    def write_report(report: dict[str, Any], directory: Path) -> Path:
        written.append(report)
        return directory / "index.html"

    def collect_routing(model: Any, tokenizer: Any, texts: Any, names: Any, progress: Any) -> dict[str, Any]:
        assert list(texts) == ["one", "two"]
        progress(sum(len(w.ids) for windows in texts.values() for w in windows))
        return {"experts": list(names)}

    page.write_report, routing.collect_routing = write_report, collect_routing  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "octad.report.files", page)
    monkeypatch.setitem(sys.modules, "octad.evaluate.routing", routing)
    code, out, _ = evaluate(mixture, "--report", tmp_path / "report")
    assert code == 0
    assert str(tmp_path / "report" / "index.html") in out
    assert written[0]["routing"] == {"experts": ["general", "lora", "full", "far"]}
    assert written[0]["command"].startswith("octad evaluate mixture --data domains.yaml")
    monkeypatch.setattr(routing, "collect_routing", None)
    evaluate(mixture, "--report", tmp_path / "report")  # kept
    assert written[1]["routing"] == written[0]["routing"]


def bad(mixture: Path, kind: str) -> Path:
    """The mixture with a random router, or with its experts' places exchanged."""
    tensors = load_file(mixture / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in list(tensors.items()):
        if name.endswith(".gate.weight") and kind == "random":
            tensors[name] = torch.randn_like(tensor)
        if name.endswith(".gate.weight") and kind == "shuffled":
            tensors[name] = tensor.roll(1, 0)
    save_file(tensors, mixture / "model.safetensors", {"format": "pt"})
    return mixture


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_a_bad_mixture_fails(mixture: Path, evaluate: Octad, kind: str) -> None:
    """Noise models differ too little for the words; the numbers are those of a mixture that is no better than its best
    members, and the exit code says so."""
    code, out, _ = evaluate(bad(mixture, kind), "--require", "mean<=oracle*0.999", "--json")
    found = json.loads(out)
    assert code == 1
    answers = {q["question"]: q["answer"] for q in found["verdict"]["questions"]}
    assert answers["better than the oracle?"] != "yes"


def test_a_report_that_cannot_be_written_is_known_before_judging(
    evaluate: Octad, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")

    def judged(*arguments: Any, **options: Any) -> None:
        raise AssertionError("judged first")

    monkeypatch.setattr("octad.api.verdicts.evaluate", judged)
    code, _, err = evaluate(mixture, "--report", tmp_path / "file" / "report")
    assert (code, err) == (
        2,
        f"octad: {tmp_path}/file/report: {tmp_path}/file is no directory; choose another one\n",
    )
    monkeypatch.setattr("octad.staging.os.access", lambda place, mode: mode & os.W_OK == 0)
    code, _, err = evaluate(mixture, "--report", tmp_path / "report")
    assert (code, err) == (2, f"octad: {tmp_path}/report: no permission to write in {tmp_path}\n")


def test_a_cache_that_was_named_is_used_or_refused(evaluate: Octad, mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = evaluate(mixture, "--cache", tmp_path / "file" / "cache")
    assert code == 2
    assert err.splitlines()[-1].endswith(f"{tmp_path}/file is no directory; choose another one")


@pytest.mark.parametrize(
    "option",
    [["--require", "mean<=oracle"], ["--dense", "x"], ["--report", "r"], ["--card"], ["--quantize", "int8"]],
)
def test_what_needs_held_out_text_is_refused_without(octad: Octad, mixture: Path, option: list[str]) -> None:
    """With tasks alone a requirement was never looked at, and the exit code was 0."""
    code, _, err = octad("evaluate", mixture, "--tasks", "octad-choice", *option)
    assert code == 2
    assert err.startswith(f"octad: {option[0]} ")
    assert "give --data, too" in err


def test_everybody_can_be_judged_rounded(world: World, evaluate: Octad) -> None:
    """Nearly the same bits, not those of the cache that an exact judge filled; and the verdict says it."""
    exact = json.loads(evaluate(world.mixture, "--json")[1])
    code, out, err = evaluate(world.mixture, "--quantize", "int8", "--json")
    assert code == 0, err
    rounded = json.loads(out)
    assert rounded["settings"]["quantize"] == "int8"
    assert "all with weights rounded to int8" in " ".join(rounded["verdict"]["sentences"])
    assert "rounded" not in " ".join(exact["verdict"]["sentences"])
    pairs = list(zip(rounded["contestants"], exact["contestants"], strict=True))
    assert any(ours["bits_per_byte"] != theirs["bits_per_byte"] for ours, theirs in pairs)
    for ours, theirs in pairs:
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=2e-2)
        assert ours["price"]["bytes"] is None or ours["price"]["bytes"] < theirs["price"]["bytes"]
    assert evaluate(world.mixture, "--quantize", "int5")[0] == 2
