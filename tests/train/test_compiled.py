"""torch.compile: the same numbers as without, asked for or not, and a clean way on where it cannot be done."""

from pathlib import Path

import pytest
import torch
from small import checkpoint, tune_file

from octad.errors import RecipeError
from octad.train import compiled
from octad.train.learner import tune_learner
from octad.train.run_config import load_config
from octad.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _as_with_native_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octad.train.trainer.not_native", lambda: "")


@pytest.fixture
def mixture(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("mixtral"), tmp_path / "mixture")


def trainer(directory: Path, mixture: Path, told: list[str], **changes: object) -> Trainer:
    learner = tune_learner(load_config(tune_file(directory, mixture, mode="all", **changes)))
    return Trainer(learner, directory / "run", told.append)


def test_a_compiled_step_is_the_same_and_judging_stays_eager(mixture, tmp_path) -> None:
    if reason := compiled.cannot_compile(torch.device("cpu")):
        pytest.skip(reason)
    evaluate = {"domains": {"one": "one.jsonl"}, "tokens": 200, "window": 16}
    told: list[str] = []
    plain = trainer(tmp_path, mixture, told, compile=False, evaluate=evaluate)
    quick = trainer(tmp_path, mixture, told, compile=True, evaluate=evaluate)
    assert told == ["compiling what lies between the products (compile: false does without)"]
    for _ in range(2):
        mine, theirs = quick.train_step()[0], plain.train_step()[0]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert quick.evaluate()["one"] == pytest.approx(plain.evaluate()["one"], rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(("devices", "enough"), [(("cpu",), 1e14), (("cuda",), 0.0)])
def test_short_runs_and_those_on_cpus_are_not_compiled(
    mixture, tmp_path, monkeypatch, devices, enough
) -> None:
    monkeypatch.setattr(compiled, "AUTO", devices)
    monkeypatch.setattr(compiled, "ENOUGH", enough)
    told: list[str] = []
    trainer(tmp_path, mixture, told)
    assert told == []


def test_where_it_cannot_be_done_it_goes_on_or_says_so(mixture, tmp_path, monkeypatch) -> None:
    def broken(function: object, **options: object) -> object:
        raise RuntimeError("no C++ compiler found\nwith a traceback")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "ENOUGH", 0.0)
    monkeypatch.setattr(compiled, "AUTO", ("cpu",))
    told: list[str] = []
    trainer(tmp_path, mixture, told)
    assert told == ["not compiled: PyTorch cannot compile here (RuntimeError: no C++ compiler found)"]
    with pytest.raises(RecipeError, match="compile: PyTorch cannot compile here"):
        trainer(tmp_path, mixture, told, compile=True)


def test_steps_without_native_passes_say_so(mixture, tmp_path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("octad.train.trainer.not_native", lambda: "no C compiler found")
    trainer(tmp_path, mixture, told)
    assert told == ["steps take a fourth longer without native passes: no C compiler found"]
