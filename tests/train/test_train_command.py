"""The verbs train and branch: what they print, which code they end with."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from small import checkpoint, jsonl, texts, tune_file

from octad.cli.main import main as cli
from octad.figures import human


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["octad", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli()
    return int(ended.value.code or 0)


@pytest.fixture
def mixture(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("mixtral"), tmp_path / "mixture")


def test_a_model_that_no_run_made_is_not_replaced(mixture, tmp_path, monkeypatch, capsys) -> None:
    file = tune_file(tmp_path, mixture)
    before = {path.name: path.read_bytes() for path in mixture.iterdir()}
    assert run(monkeypatch, "train", file, "-o", mixture) == 2
    assert "exists and is no run; choose another -o" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in mixture.iterdir()}


def test_train_tells_writes_and_is_done_once(mixture, tmp_path, monkeypatch, capsys) -> None:
    file = tune_file(tmp_path, mixture, mode="router", low_rank={"rank": 2}, log_every=4)
    assert run(monkeypatch, "train", file, "-o", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "no effect: low_rank (mode 'router' has no low-rank changes)" in printed.err
    assert "step 8/8  loss" in printed.err
    opening, *lines = [line for line in printed.err.splitlines() if "no effect" not in line]
    parameters = sum(t.numel() for t in load_file(mixture / "model.safetensors").values())
    assert opening.startswith(
        f"mixtral, {human(parameters)} parameters, 192 learn; "
    )  # two routers of three rows of 32
    assert "of 2 sources; steps 1 to 8 of 128 tokens in float32 on cpu: about " in opening
    assert [line.endswith(" left") for line in lines if line.startswith("step ")] == [True, False]
    assert printed.out == f"wrote {tmp_path / 'out'}\n"
    assert run(monkeypatch, "train", file, "-o", tmp_path / "out") == 2
    assert "is finished (8 steps); raise steps, or choose another -o" in capsys.readouterr().err
    assert run(monkeypatch, "train", file) == 2
    assert "no output given; add -o DIRECTORY" in capsys.readouterr().err
    assert run(monkeypatch, "inspect", tmp_path / "out") == 0


def test_an_output_that_cannot_be_written_is_known_before_models_are_opened(
    mixture, tmp_path, monkeypatch, capsys
) -> None:
    def opened(*arguments: object, **options: object) -> None:
        raise AssertionError("opened first")

    monkeypatch.setattr("octad.train.learner.tune_learner", opened)
    monkeypatch.setattr("octad.train.branch.branch", opened)
    (tmp_path / "file").write_text("")
    specialist = {"name": "one", "data": str(jsonl(tmp_path / "one.jsonl", texts(6)))}
    branch = tmp_path / "branch.yaml"
    branch.write_text(yaml.safe_dump({"base": str(mixture), "steps": 1, "experts": [specialist]}))
    for verb, config in (("train", tune_file(tmp_path, mixture)), ("branch", branch)):
        assert run(monkeypatch, verb, config, "-o", tmp_path / "file" / "out") == 2
        assert f"{tmp_path}/file is no directory; choose another one" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(mixture, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("octad.train.trainer.Trainer._one_step", lambda self, telemetry: raise_signal())
    file = tune_file(tmp_path, mixture, mode="router")
    assert run(monkeypatch, "train", file, "-o", tmp_path / "out") == 130
    assert "stopped and saved; the same command goes on" in capsys.readouterr().err


def raise_signal() -> None:
    import signal

    signal.raise_signal(signal.SIGTERM)


def test_branch_trains_only_the_one_asked_for(tiny_checkpoint, tmp_path, monkeypatch, capsys) -> None:
    base = checkpoint(tiny_checkpoint("llama"), tmp_path / "base")
    jsonl(tmp_path / "one.jsonl", texts(60))
    raw = {"base": str(base), "steps": 2, "schedule": {"warmup": 1}, "dtype": "float32"}
    raw |= {"data": {"window": 32, "cache": str(tmp_path / "cache")}, "batch": {"windows": 2, "micro": 2}}
    raw |= {"experts": [{"name": n, "data": "one.jsonl"} for n in ("one", "two")]}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(raw))
    assert run(monkeypatch, "branch", tmp_path / "b.yaml", "-o", tmp_path / "out", "--only", "two") == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["two"]
    assert run(monkeypatch, "train", tmp_path / "b.yaml", "-o", tmp_path / "x") == 2
    assert "it is for `octad branch`" in capsys.readouterr().err
    recipe = {"base": str(base), "experts": [{"name": "one", "model": "base", "data": "one.jsonl"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert run(monkeypatch, "train", tmp_path / "r.yaml", "-o", tmp_path / "x") == 2
    assert "it is for `octad combine`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere"}, "nowhere: no such file or directory"),
        ({"evaluate": {"domains": {"x": "nowhere.jsonl"}}}, "nowhere.jsonl: no such file"),
        ({"device": "cuda"}, "PyTorch sees no GPU here"),
        ({"routing": {"top1": "swich"}}, "routing.top1"),
    ],
)
def test_mistakes_are_one_line_before_the_first_step(
    mixture, tmp_path, monkeypatch, capsys, changes, message
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tune_file(tmp_path, changes.pop("model", mixture), **changes)
    assert run(monkeypatch, "train", file, "-o", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tuned_mixture_has_a_card_and_strange_sources_are_said(
    mixture, tmp_path, monkeypatch, capsys
) -> None:
    """What was judged before is not claimed of the new weights; a source that names no expert is learnt from and said."""
    card = "---\nlicense: mit\n---\n# M\n\n<!-- octad verdict: 9 tokens -->\nbest\n<!-- end of octad verdict -->\n"
    (mixture / "README.md").write_text(card)
    names = {"recipe": {}, "base": {}, "experts": [{"name": n} for n in ("one", "tow", "three")]}
    (mixture / "octad.json").write_text(json.dumps(names))
    file = tune_file(tmp_path, mixture, mode="router", steps=2)
    assert run(monkeypatch, "train", file, "-o", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr()
    assert "data source 'two' names no expert of the mixture (did you mean 'tow'?)" in printed.err
    assert "source 'one'" not in printed.err
    assert json.loads(printed.out.splitlines()[-1])["steps"] == 2
    written = (tmp_path / "out" / "README.md").read_text()
    assert written.startswith("---\nlicense: mit\n---\n# M\n\n## Trained further\n")
    assert "mode `router`" in written
