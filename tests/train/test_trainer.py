"""Runs: they learn, resume bit for bit after a kill, stop cleanly, and write what every other command reads."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import checkpoint, tune_file

from octad import portable
from octad.checkpoint.load import load_model, open_source
from octad.errors import CheckpointError, OutputError, RecipeError
from octad.model.moe import FixedRouter
from octad.train.distill import teach
from octad.train.learner import tune_learner
from octad.train.run_config import load_config
from octad.train.state import latest_state
from octad.train.trainer import Outcome, Trainer, TrainingStopped

NOISY = {"balance": 0.01, "z": 0.001, "bias": 1e-3, "jitter": 0.1, "sample": True}


@pytest.fixture
def mixture(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("mixtral", num_local_experts=4), tmp_path / "mixture")


def trainer(file: Path, run: Path) -> Trainer:
    return Trainer(tune_learner(load_config(file)), run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.parametrize(
    ("mode", "experts"), [("router", True), ("repair", True), ("repair", False), ("all", True)]
)
def test_only_what_the_mode_names_changes_and_the_result_loads(mixture, tmp_path, mode, experts) -> None:
    out = tmp_path / "tuned"
    low_rank = {"low_rank": {"experts": experts}} if mode == "repair" else {}
    file = tune_file(tmp_path, mixture, mode=mode, optimizer={"lr": 0.01}, **low_rank)
    assert trainer(file, out).fit() is Outcome.FINISHED
    before, after = weights(mixture), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {
        "router": {name for name in before if name.endswith("block_sparse_moe.gate.weight")},
        "repair": {name for name in before if experts or ".experts." not in name},
        "all": set(before),
    }
    assert changed == kinds[mode]
    load_model(open_source(out))
    assert json.loads((out / "training.json").read_text())[0]["mode"] == mode


def test_the_saved_repair_computes_what_the_trained_model_does(mixture, tmp_path) -> None:
    run = trainer(tune_file(tmp_path, mixture, mode="repair", optimizer={"lr": 0.01}), tmp_path / "tuned")
    run.fit()
    tokens = torch.randint(0, 95, (2, 30))
    with torch.no_grad():
        mine = run.model.eval()(tokens)
        torch.testing.assert_close(load_model(open_source(tmp_path / "tuned"))(tokens), mine)
        assert not torch.allclose(load_model(open_source(mixture))(tokens), mine, atol=1e-3)


def test_training_lowers_the_loss(mixture, tmp_path) -> None:
    file = tune_file(tmp_path, mixture, mode="all", steps=40, optimizer={"lr": 0.01}, log_every=1)
    trainer(file, tmp_path / "tuned").fit()
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "tuned" / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.6 * losses[0]


def test_accumulation_and_checkpointing_change_nothing(mixture, tmp_path) -> None:
    results = []
    for n, batch in enumerate(
        ({"windows": 4, "micro": 4}, {"windows": 4, "micro": 1, "checkpointing": True})
    ):
        file = tune_file(tmp_path, mixture, mode="all", batch=batch)
        trainer(file, tmp_path / f"tuned{n}").fit()
        results.append(weights(tmp_path / f"tuned{n}"))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=2e-4)


def test_distillation_hears_each_windows_own_member(mixture, tmp_path) -> None:
    provenance = {"recipe": {}, "base": {}, "experts": [{"name": n} for n in ("x", "one", "y", "two")]}
    (mixture / "octad.json").write_text(json.dumps(provenance))
    file = tune_file(tmp_path, mixture, mode="repair", distill=0.5, optimizer={"lr": 0.01})
    run = trainer(file, tmp_path / "tuned")
    run.fit()  # the teacher stays what the mixture was
    batch = run.stream.next(2)
    taught = teach(run.learner, batch, None)
    for row, expert in enumerate((1, 3)):
        alone = load_model(open_source(mixture))
        for layer in alone.model.layers:
            layer.mlp.gate = FixedRouter([expert])
        with torch.no_grad():
            torch.testing.assert_close(
                taught.x.view(2, 32, -1)[row], alone.model(batch.tokens[row : row + 1])[0]
            )
    assert json.loads((tmp_path / "tuned" / "octad.json").read_text())["edits"] == [
        "trained (repair, 8 steps)"
    ]
    bad = tune_file(tmp_path, mixture, distill=1.0, data=yaml_data(tmp_path, "three"))
    with pytest.raises(RecipeError, match="no expert 'three' to distil from"):
        tune_learner(load_config(bad))


def yaml_data(directory: Path, name: str) -> dict[str, object]:
    return {
        "window": 32,
        "cache": str(directory / "cache"),
        "sources": [{"name": name, "data": "one.jsonl"}],
    }


# ---- never lose work ---------------------------------------------------------------------------------------


def spawn(file: Path, run: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path\n"
        "from octad.train.run_config import load_config; from octad.train.learner import tune_learner\n"
        "from octad.train.trainer import Trainer\n"
        "run = Trainer(tune_learner(load_config(sys.argv[1])), Path(sys.argv[2]), lambda s: print(s, flush=True))\n"
        "print(run.fit().value, flush=True)"
    )
    command = [sys.executable, "-c", code, str(file), str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_and_resumed_equals_never_stopped_bit_for_bit(mixture, tmp_path) -> None:
    settings = {"mode": "all", "steps": 12, "routing": NOISY, "log_every": 1, "save": {"every": 3}}
    settings |= {"optimizer": {"name": "muon", "lr": 0.01}, "dtype": "bfloat16"}
    trainer(tune_file(tmp_path, mixture, **settings), tmp_path / "whole").fit()
    file = tune_file(tmp_path, mixture, **settings)
    process = spawn(file, tmp_path / "killed")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.kill()
            break
    process.wait()
    assert not (tmp_path / "killed" / "config.json").exists()
    resumed = trainer(file, tmp_path / "killed")
    assert 3 <= resumed.step < 12
    resumed.fit()
    states = [load_file(latest_state(tmp_path / name) / "state.safetensors") for name in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(bool((states[0][f"bias.{n}"] == 0).all()) for n in range(2))  # faded: the format has none
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_saves_and_ends_cleanly(mixture, tmp_path) -> None:
    file = tune_file(tmp_path, mixture, steps=100000, log_every=1)
    process = spawn(file, tmp_path / "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    assert process.stdout.read().splitlines()[-1] == "stopped"
    assert process.wait() == 0
    assert latest_state(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_bad_step_stops_the_run_and_names_the_batch(mixture, tmp_path) -> None:
    run = trainer(tune_file(tmp_path, mixture, save={"every": 1}), tmp_path / "run")
    run.train_step()
    run.step = 1
    run.save()
    kept = latest_state(tmp_path / "run")
    before = {k: v.clone() for k, v in run.optimizer.values().items()}
    with torch.no_grad():
        run.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingStopped, match=r"windows: one 2, two 2, .*last good state: step-00000001"):
        run.train_step()
    assert latest_state(tmp_path / "run") == kept
    for name, value in run.optimizer.values().items():
        assert name == "model.norm.weight" or torch.equal(value, before[name])
    run.mean_loss = 1e-6
    with torch.no_grad():
        run.model.model.norm.weight.fill_(1.0)
    with pytest.raises(TrainingStopped, match="running mean 1e-06"):
        run.train_step()


def test_resuming_with_another_config_tells_or_refuses(mixture, tmp_path) -> None:
    trainer(tune_file(tmp_path, mixture), tmp_path / "run").fit()
    with pytest.raises(OutputError, match="is finished"):
        trainer(tune_file(tmp_path, mixture), tmp_path / "run").fit()
    data = yaml.safe_load((tmp_path / "tune0.yaml").read_text())["data"] | {"window": 16}
    with pytest.raises(CheckpointError, match=r"cannot resume: data\.window changed"):
        trainer(tune_file(tmp_path, mixture, data=data), tmp_path / "run")
    told: list[str] = []
    longer = tune_learner(load_config(tune_file(tmp_path, mixture, steps=10)))
    longer = Trainer(longer, tmp_path / "run", told.append)
    assert "changed since it was saved: steps" in told
    assert longer.fit() is Outcome.FINISHED
    other = weights(mixture)
    other["model.norm.weight"] += 1
    save_file(other, mixture / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="identity"):
        trainer(tune_file(tmp_path, mixture, steps=12), tmp_path / "run")


def test_a_full_disk_leaves_the_last_state(mixture, tmp_path, monkeypatch) -> None:
    run = trainer(tune_file(tmp_path, mixture), tmp_path / "run")
    run.train_step()
    run.save()
    kept = latest_state(tmp_path / "run")
    run.step += 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octad.train.state.save_file", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run.save()
    assert latest_state(tmp_path / "run") == kept
    assert [p.name for p in (tmp_path / "run" / "states").iterdir()] == [kept.name]


def test_a_directory_that_is_no_run_is_refused(mixture, tmp_path) -> None:
    shutil.copytree(mixture, tmp_path / "other")
    with pytest.raises(OutputError, match="exists and is no run"):
        trainer(tune_file(tmp_path, mixture), tmp_path / "other")


def test_held_out_text_is_judged_while_training(mixture, tmp_path) -> None:
    evaluate = {"domains": {"one": "one.jsonl"}, "every": 4, "tokens": 200, "window": 32}
    trainer(tune_file(tmp_path, mixture, evaluate=evaluate), tmp_path / "run").fit()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    judged = [r for r in records if "held_out" in r]
    assert [r["step"] for r in judged] == [0, 4, 8]
    told = next(r for r in records if "layers" in r)
    assert len(told["layers"]) == 2
    assert sum(told["layers"][0]["share"]) == pytest.approx(1)
    assert set(told["bits_per_byte"]) == {"one", "two"}


def test_two_processes_do_not_train_in_one_directory(mixture, tmp_path) -> None:
    """The second is refused while the first has the log; both would write states, and a log of both."""
    file = tune_file(tmp_path, mixture, mode="router")
    run = tmp_path / "run"
    run.mkdir()
    other = (run / "log.jsonl").open("a")
    portable.lock(other.fileno())
    with pytest.raises(OutputError, match="another process trains here; wait for it, or choose another -o"):
        trainer(file, run).fit()
    other.close()
    trainer(file, run).fit()
    assert (run / "config.json").is_file()


def test_text_is_judged_in_windows_that_the_model_sees(mixture: Path, tmp_path: Path) -> None:
    """However long the file says that they are."""
    held_out = []
    context = open_source(mixture).config.max_position_embeddings
    for window in (context, 10**12):
        evaluate = {"domains": {"one": "one.jsonl"}, "tokens": 400, "window": window}
        made = trainer(tune_file(tmp_path, mixture, evaluate=evaluate), tmp_path / "run")
        held_out.append([list(w.ids) for w in made.held_out["one"]])
    assert held_out[0] == held_out[1]
    assert max(map(len, held_out[1])) == context
