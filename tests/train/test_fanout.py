"""Specialists over a local Ray cluster: the same weights as in turn, failures alone, lost workers go on."""

import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import checkpoint
from test_branch import config

from octad.errors import DataError, RecipeError
from octad.train.branch import branch
from octad.train.fanout import Board, fan_out
from octad.train.run_config import RaySpec
from octad.train.sections import ParallelSpec
from octad.train.state import latest_state
from octad.train.trainer import Outcome, TrainingStopped

PAIRS = {"windows": 4, "micro": 2}


@pytest.fixture
def base(tiny_checkpoint, tmp_path: Path) -> Path:
    return checkpoint(tiny_checkpoint("llama"), tmp_path / "base")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")  # a busy machine starts it slowly
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_without_ray_one_line_says_what_to_install(base, tmp_path: Path, monkeypatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> object:
        if name == "ray":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"--ray needs ray: pip install 'octad\[ray\]'"):
        fan_out(config(tmp_path, base), tmp_path / "out", echo=print)
    assert not (tmp_path / "out").exists()


def test_the_board_forgets_what_was_taken() -> None:
    board = Board()
    board.show("a", 0.1)
    board.show("a", 0.2)
    board.tell("line")
    assert board.take() == ({"a": 0.2}, ["line"])
    assert board.take() == ({}, [])


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_same_specialists_as_in_turn_and_a_failure_stays_alone(cluster, base, tmp_path: Path) -> None:
    spec, told, shown = config(tmp_path, base), list[str](), dict[str, float]()
    branch(spec, tmp_path / "turn", echo=told.append)
    (tmp_path / "one.jsonl").rename(tmp_path / "kept")
    with pytest.raises(
        TrainingStopped, match=r"1 specialist failed \(one\); the first: .*one.jsonl: no such file"
    ):
        fan_out(spec, tmp_path / "ray", echo=told.append, progress=shown.__setitem__)
    assert shown["two"] == 1.0
    assert any(line.startswith("two: step 6/6") for line in told)
    (tmp_path / "kept").rename(tmp_path / "one.jsonl")
    assert fan_out(spec, tmp_path / "ray", echo=told.append) is Outcome.FINISHED
    assert "two: finished earlier (6 steps)" in told
    for name in ("one", "two"):
        mine, theirs = weights(tmp_path / "ray", name), weights(tmp_path / "turn", name)
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_lost_worker_is_run_again_and_goes_on(cluster, base, tmp_path: Path, monkeypatch) -> None:
    spec = config(tmp_path, base, steps=400, save={"every": 1}, log_every=1, evaluate={})
    told, killed = list[str](), list[int]()

    def watch(line: str) -> None:
        told.append(line)
        if not killed and "step 5/" in line:
            killed.append(worker())
            os.kill(killed[0], signal.SIGKILL)

    assert fan_out(spec, tmp_path / "ray", echo=watch, only="one") is Outcome.FINISHED
    assert killed
    assert any(line.startswith("one: resuming") for line in told)
    branch(spec, tmp_path / "turn", echo=told.append, only="one")
    mine, theirs = weights(tmp_path / "ray", "one"), weights(tmp_path / "turn", "one")
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def worker() -> int:
    """The process of the task that is running."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_work" in place.read_bytes():
                return int(place.parent.name)
        except OSError:
            continue
    raise AssertionError("no worker")


@pytest.mark.slow
def test_a_signal_stops_all_workers_saved(cluster, base, tmp_path: Path) -> None:
    spec, sent = config(tmp_path, base, steps=100000, log_every=1), list[int]()

    def watch(line: str) -> None:
        if not sent and "step 3/" in line:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)

    assert fan_out(spec, tmp_path / "ray", echo=watch, only="two") is Outcome.STOPPED
    assert latest_state(tmp_path / "ray" / "two") is not None


@pytest.mark.slow
def test_what_the_cluster_does_not_have_is_one_line(cluster, base, tmp_path: Path) -> None:
    spec = config(tmp_path, base).model_copy(update={"ray": RaySpec(gpus=2)})
    with pytest.raises(
        RecipeError, match=r"no machine has 1 CPUs and 2 GPUs \(there are: 2 CPUs and 0 GPUs\)"
    ):
        fan_out(spec, tmp_path / "ray", echo=print)


@pytest.mark.slow
def test_two_processes_train_each_specialist_together(cluster, base, tmp_path: Path) -> None:
    """Sharded over both, to the weights of one process within rounding; a second call finds it done."""
    spec, told, shown = config(tmp_path, base, batch=PAIRS), list[str](), dict[str, float]()
    branch(spec, tmp_path / "turn", echo=told.append)
    wide = spec.model_copy(update={"ray": RaySpec(processes=2, cpus=1), "parallel": ParallelSpec(shard=True)})
    told.clear()
    assert fan_out(wide, tmp_path / "ray", echo=told.append, progress=shown.__setitem__) is Outcome.FINISHED
    assert "2 specialists, 2 processes each over a cluster of 2 CPUs and 0 GPUs" in told
    assert sum(line == "two: 2 processes: weights sharded" for line in told) == 1  # one speaks
    assert shown == {"one": 1.0, "two": 1.0}
    for name in ("one", "two"):
        mine, theirs = weights(tmp_path / "ray", name), weights(tmp_path / "turn", name)
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-4, msg=key)
    assert fan_out(wide, tmp_path / "ray", echo=told.append, only="two") is Outcome.FINISHED
    assert "two: finished earlier (6 steps)" in told
    assert {path.name for path in (tmp_path / "ray").iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_several_processes_stop_saved_and_their_errors_are_one_line(cluster, base, tmp_path: Path) -> None:
    spec, sent = config(tmp_path, base, steps=100000, log_every=1, batch=PAIRS), list[int]()
    wide = spec.model_copy(update={"ray": RaySpec(processes=2)})

    def watch(line: str) -> None:
        if not sent and "step 3/" in line:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)

    assert fan_out(wide, tmp_path / "ray", echo=watch, only="two") is Outcome.STOPPED
    assert latest_state(tmp_path / "ray" / "two") is not None
    (tmp_path / "one.jsonl").unlink()
    with pytest.raises(TrainingStopped, match=r"one.jsonl: no such file"):
        fan_out(wide, tmp_path / "ray", echo=print, only="one")
    with pytest.raises(RecipeError, match=r"3 processes need 3 CPUs, the cluster has 2"):
        fan_out(spec.model_copy(update={"ray": RaySpec(processes=3)}), tmp_path / "ray", echo=print)
