"""Nothing is lost: a run killed at any moment, within a save too, ends with the bits of one that never was."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
from safetensors.torch import load_file
from small import checkpoint, tune_file

from octad.dist import World
from octad.errors import CheckpointError, OutputError
from octad.staging import StagedDirectory
from octad.train import export, state
from octad.train.learner import tune_learner
from octad.train.run_config import load_config
from octad.train.signals import StopRequest
from octad.train.state import Saver, latest_state, load_facts, load_tensors, saved_names
from octad.train.trainer import Trainer

NOISY = {"balance": 0.01, "bias": 1e-3, "jitter": 0.1, "sample": True}
SETTINGS: dict[str, Any] = {"mode": "all", "steps": 12, "routing": NOISY, "save": {"every": 1}, "spike": 0}
SETTINGS |= {"optimizer": {"name": "muon", "lr": 0.01}, "dtype": "bfloat16"}


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch) -> None:
    """A killed process loses nothing that it has written; waiting for the disk is for power cuts."""
    monkeypatch.setattr("octad.portable.sync", lambda path: None)


@pytest.fixture
def mixture(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("mixtral", num_local_experts=4), tmp_path / "mixture")


def fit(file: Path, run: Path) -> Trainer:
    trainer = Trainer(tune_learner(load_config(file)), run)
    trainer.fit()
    return trainer


def forked(work: Callable[[], object]) -> int:
    """The pid of a child that does some work and then ends at once."""
    if pid := os.fork():
        return pid
    try:
        work()
    finally:
        os._exit(0)


def whole_state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest_state(run) / "state.safetensors")


def same_bits(run: Path, other: Path) -> None:
    for first, second in (
        (whole_state(run), whole_state(other)),
        tuple(load_file(path / "model.safetensors") for path in (run, other)),
    ):
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


# ---- SIGKILL -----------------------------------------------------------------------------------------------


def test_killed_at_random_moments_ends_with_the_same_bits(mixture, tmp_path: Path) -> None:
    file = tune_file(tmp_path, mixture, **SETTINGS)
    started = time.monotonic()
    fit(file, tmp_path / "whole")
    lasted, draw = min(3.0, time.monotonic() - started), random.Random(4)
    for _ in range(6):
        pid = forked(lambda: fit(file, tmp_path / "run"))
        time.sleep(draw.uniform(0.1, 0.7) * lasted)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if (tmp_path / "run" / "config.json").exists():
            break
    if not (tmp_path / "run" / "config.json").exists():
        fit(file, tmp_path / "run")
    same_bits(tmp_path / "run", tmp_path / "whole")


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.write_bytes(b"half")
    die()


@pytest.mark.parametrize(
    "moment", ["the state's rename", "the model's rename", "the model's last file", "the end"]
)
def test_a_kill_leaves_no_litter_that_stays(mixture, tmp_path: Path, moment: str) -> None:
    file = tune_file(
        tmp_path, mixture, **SETTINGS | {"steps": 3, "schedule": {"warmup": 1}, "dtype": "float32"}
    )
    run = tmp_path / "run"

    def doomed() -> None:
        if moment == "the end":
            type(run).rmdir = die
        elif moment == "the model's last file":
            export.os.replace = lambda old, new: (
                die() if Path(new).name == "config.json" else os.rename(old, new)
            )
        else:
            where, rename = "states" if "state" in moment else "run", StagedDirectory._rename
            StagedDirectory._rename = lambda s: die() if s.final.parent.name == where else rename(s)
        fit(file, run)

    os.waitpid(forked(doomed), 0)
    left = [p.name for p in run.rglob("*")]
    assert [n for n in left if "incomplete" in n or "making" in n]
    if (run / "config.json").exists():
        with pytest.raises(OutputError, match="is finished"):
            fit(file, run)
    else:
        fit(file, run)
    assert [p.name for p in run.rglob("*") if "incomplete" in p.name or "making" in p.name] == []
    fit(file, tmp_path / "whole")
    same_bits(run, tmp_path / "whole")


TRAPS: dict[str, tuple[object, str, Callable[..., None]]] = {
    "before tensors": (state, "save_file", die),
    "within tensors": (state, "save_file", half_written),
    "before the marker": (state.json, "dumps", die),
    "before the rename": (StagedDirectory, "_rename", die),
    "after the rename": (state.shutil, "rmtree", die),
}


@pytest.mark.parametrize("moment", TRAPS)
def test_killed_within_a_save(mixture, tmp_path: Path, moment: str) -> None:
    file = tune_file(tmp_path, mixture, **SETTINGS | {"steps": 4, "schedule": {"warmup": 1}})
    fit(file, tmp_path / "whole")

    def doomed() -> None:
        trainer = Trainer(tune_learner(load_config(file)), tmp_path / "run")
        trainer.save()
        trainer.train_step()
        trainer.step = 1
        trainer.save()
        trainer.train_step()
        trainer.step = 2
        owner, name, trap = TRAPS[moment]
        setattr(owner, name, trap)
        trainer.save()

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    _, status = os.waitpid(forked(doomed), 0)
    assert os.WIFSIGNALED(status)
    trainer = Trainer(tune_learner(load_config(file)), tmp_path / "run")
    assert trainer.step == (2 if moment == "after the rename" else 1)
    trainer.fit()
    same_bits(tmp_path / "run", tmp_path / "whole")
    assert len(list((tmp_path / "run" / "states").iterdir())) <= 3  # nothing half-written piles up


# ---- the states themselves ---------------------------------------------------------------------------------


def test_an_asynchronous_state_is_that_of_its_moment(tmp_path: Path, monkeypatch) -> None:
    gate, real = threading.Event(), state.save_file

    def slow(*arguments: Any) -> None:
        gate.wait()
        real(*arguments)

    monkeypatch.setattr(state, "save_file", slow)
    saver, values = Saver(tmp_path, World(), keep=2, asynchronous=True), torch.arange(4.0)
    saver.save(1, {"a": values}, {})
    values += 7
    assert latest_state(tmp_path) is None
    gate.set()
    saver.close()
    target = {"a": torch.zeros(4)}
    load_tensors(latest_state(tmp_path), target, World())
    assert target["a"].tolist() == [0, 1, 2, 3]


def test_what_fails_behind_is_told_at_the_next_save(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    saver = Saver(tmp_path, World(), keep=2, asynchronous=True)
    saver.save(1, {"a": torch.zeros(3)}, {})
    with pytest.raises(OutputError, match="step-00000001: the disk is full: 12 bytes are needed"):
        saver.save(2, {"a": torch.zeros(3)}, {})
    saver.close()
    assert list((tmp_path / "states").iterdir()) == []


def test_asynchronous_runs_end_with_the_same_bits(mixture, tmp_path: Path) -> None:
    for name, behind in (("at-once", False), ("behind", True)):
        file = tune_file(tmp_path, mixture, **SETTINGS | {"save": {"every": 1, "asynchronous": behind}})
        fit(file, tmp_path / name)
    same_bits(tmp_path / "behind", tmp_path / "at-once")


ODD: dict[str, Any] = {"config": {}, "identity": {}, "data": {"taken": {}}, "mean_loss": math.nan, "ranks": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"}, {"step": 10**40}, {"step": 4}, {"step": None}, {"step": -3}, {"files": []}, {"files": {"a\0": 1}},
        {"files": {"a" * 5000: 1}}, {"files": {"state.safetensors": "1"}}, {"data": {"taken": {"one": -1}}}, {"data": []},
        {"mean_loss": "much"}, {"config": None}, {"identity": 7}, {"format": 1}, {"\ud800": 1, "ranks": "\ud800"},
    ],
)  # fmt: skip
def test_an_odd_state_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    Saver(tmp_path, World(), keep=2, asynchronous=False).save(3, {"a": torch.arange(4.0)}, ODD)
    file = tmp_path / "states" / "step-00000003" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match="step-00000003: damaged") as caught:
        load_facts(file.parent)
    assert "\n" not in str(caught.value)
    for text in ("[]", "7", "[" * 100_000, "\0", '{"step": 3'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="step-00000003: damaged"):
            load_facts(file.parent)


def test_a_damaged_state_is_one_line(tmp_path: Path) -> None:
    saver = Saver(tmp_path, World(), keep=2, asynchronous=False)
    saver.save(3, {"a": torch.arange(4.0), "n": torch.tensor(2.0)}, ODD)
    found = latest_state(tmp_path)
    assert saved_names(found) == {"a", "n"}
    assert load_facts(found)["step"] == 3
    with pytest.raises(CheckpointError, match="step-00000003: damaged"):
        load_tensors(found, {"b": torch.zeros(4)}, World())
    file = found / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match=r"damaged \(state.safetensors has not the .* bytes"):
        load_facts(found)
    with pytest.raises(CheckpointError, match="damaged"):
        saved_names(found)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k", "none", place], capture_output=True)
    if made.returncode:
        pytest.skip("no permission to mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(mixture, tmp_path: Path, tiny_disk: Path) -> None:
    file = tune_file(tmp_path, mixture, mode="all", save={"every": 1, "keep": 3}, dtype="bfloat16")
    trainer = Trainer(tune_learner(load_config(file)), tiny_disk / "run")
    with pytest.raises(OutputError, match=r"step-0000000\d: .*bytes are needed, .* are free") as caught:
        trainer.fit()
    assert "\n" not in str(caught.value)
    kept = latest_state(tiny_disk / "run")
    assert kept is not None
    assert [p.name for p in (tiny_disk / "run" / "states").iterdir() if p.name.startswith(".")] == []
    subprocess.run(["mount", "-o", "remount,size=8m", tiny_disk], check=True)
    resumed = fit(file, tiny_disk / "run")
    assert resumed.finished


# ---- signals, many processes -------------------------------------------------------------------------------


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt; a shell's background jobs start with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_one_signal_of_each_kind_is_a_wish(interruptible: None) -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def start(
    ranks: int, file: Path, run: Path, launch: Sequence[str] = ("--standalone",), **how: Any
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *launch, f"--nproc-per-node={ranks}"]
    command += [rank_worker.__file__, str(file), str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def until(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"no line {beginning!r}")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("behind", [False, True])
def test_two_ranks_killed_and_resumed_bit_for_bit(mixture, tmp_path: Path, behind: bool) -> None:
    settings = SETTINGS | {"batch": {"windows": 4, "micro": 2}, "parallel": {"shard": True, "expert": 2}}
    settings |= {"log_every": 1, "steps": 30, "save": {"every": 1, "asynchronous": behind}}
    file = tune_file(tmp_path, mixture, **settings)
    assert start(2, file, tmp_path / "whole").wait() == 0
    for step in (4, 12):
        process = start(2, file, tmp_path / "run")
        until(process, f"step {step}/")
        os.kill(children(process.pid)[1], signal.SIGKILL)
        process.communicate()
        assert process.returncode != 0
    assert start(2, file, tmp_path / "run").wait() == 0
    first, second = (latest_state(tmp_path / name) for name in ("run", "whole"))
    for path in sorted(second.glob("*.safetensors")):
        mine, theirs = load_file(first / path.name), load_file(path)
        assert [n for n in theirs if not torch.equal(mine[n], theirs[n])] == []
    assert any(name.startswith("random.cpu.1") for name in saved_names(first))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["sigterm", "ctrl-c"])
def test_a_wish_stops_all_ranks_and_one_process_goes_on(mixture, tmp_path: Path, by: str) -> None:
    """SIGTERM to torchrun; Ctrl-C as a terminal gives it, to torchrun and to each of its processes."""
    settings = SETTINGS | {"batch": {"windows": 4, "micro": 2}, "parallel": {"shard": True}, "log_every": 1}
    file = tune_file(tmp_path, mixture, **settings | {"steps": 100000, "save": {"every": 100000}})
    process = start(2, file, tmp_path / "run", start_new_session=True, preexec_fn=listen)
    until(process, "step 3/")
    if by == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    told = process.communicate()[0]
    assert told.count("stopped\n") == 2, told
    step = load_facts(latest_state(tmp_path / "run"))["step"]
    assert step >= 3
    last = fit(tune_file(tmp_path, mixture, **settings | {"steps": max(12, step + 1)}), tmp_path / "run")
    assert last.finished


def listen() -> None:
    """In a child: SIGINT has its usual effect, whatever this process was started with."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
def test_two_machines_of_one_process_each_are_one_run(mixture, tmp_path: Path) -> None:
    """Two launchers that meet at an address, as on two machines, give the bits of one launcher's two processes."""
    settings = SETTINGS | {"batch": {"windows": 4, "micro": 2}, "parallel": {"shard": True, "expert": 2}}
    file = tune_file(tmp_path, mixture, **settings)
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    machines = [
        start(1, file, tmp_path / "two", launch=["--nnodes=2", "--rdzv-backend=c10d", meeting])
        for _ in range(2)
    ]
    told = [process.communicate()[0] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], told
    assert start(2, file, tmp_path / "one").wait() == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("two", "one")]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])
