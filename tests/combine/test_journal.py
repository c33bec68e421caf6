"""A run of combine that was cut short is gone on with: the same bytes, nothing of what was done read or written again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cut_short
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_together import alone, recipe, same

from octad.checkpoint.writer import CheckpointWriter
from octad.combine import calibrate, journal
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.combine.recipe import Recipe

LAYERS = 2


class Cut(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture
def at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY", 0.0)


def carried_out(file: Path, out: Path, told: list[str]) -> Path:
    torch.set_num_threads(1)
    return combine(preflight(Recipe.load(file), out), out, max_shard_bytes=20_000, tell=told.append)


def cut_after(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """The next run ends when so many layers are done; with more layers than there are, some tensors later."""
    entries: list[int] = []

    def enter(self: journal.Journal, done: int) -> None:
        real(self, done)
        entries.append(done)
        if done >= layers or len(entries) > LAYERS + 2:
            raise Cut

    real = journal.Journal.enter
    monkeypatch.setattr(journal.Journal, "enter", enter)


def written_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for verb in ("write", "copy"):
        real = getattr(CheckpointWriter, verb)

        def spy(self: CheckpointWriter, name: str, *given: Any, real: Any = real) -> None:
            names.append(name)
            real(self, name, *given)

        monkeypatch.setattr(CheckpointWriter, verb, spy)
    return names


@pytest.mark.parametrize(("method", "layers"), [("ridge", 1), ("logistic", LAYERS), ("random", 1)])
def test_a_run_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch, at_every_layer, method: str, layers: int
) -> None:
    file = recipe(tmp_path, router={"method": method, "tokens": 200, "window": 32})
    want, before = alone(file, tmp_path / "one"), set(tmp_path.iterdir())
    told: list[str] = []
    with monkeypatch.context() as patch:
        first = written_names(patch)
        cut_after(patch, 0 if method == "random" else layers)
        with pytest.raises(Cut):
            carried_out(file, tmp_path / "out", told)
    (stage,) = set(tmp_path.iterdir()) - before
    kept = json.loads((stage / journal.PLACE / journal.DONE).read_text())["written"]
    assert kept
    assert set(kept) <= set(first)
    assert told == [f"kept for the same command to go on with: {stage} (0.0 GB)"]
    with monkeypatch.context() as patch:
        second = written_names(patch)
        shown: list[int] = []
        advance = calibrate._advance
        patch.setattr(calibrate, "_advance", lambda *given: shown.append(1) or advance(*given))
        same(carried_out(file, tmp_path / "out", told), want)
    assert f"shards kept, {0 if method == 'random' else min(layers, LAYERS)} layers calibrated" in told[-1]
    if method != "random":  # there the cut may come before the first file is full
        assert not told[-1].startswith("going on where an earlier run stopped: 0 of")
    assert not set(kept) & set(second)
    assert bool(shown) == (method != "random" and layers < LAYERS)
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}


def test_what_was_made_of_something_else_is_not_gone_on_with(
    tmp_path: Path, monkeypatch, at_every_layer
) -> None:
    file = recipe(tmp_path)
    told: list[str] = []
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        cut_after(patch, 1)
        with pytest.raises(Cut):
            carried_out(file, tmp_path / "out", told)
    weights = tmp_path / "full" / "model.safetensors"
    save_file({name: t * 1.5 for name, t in load_file(weights).items()}, weights, {"format": "pt"})
    told.clear()
    same(carried_out(file, tmp_path / "out", told), alone(file, tmp_path / "one"))
    assert told == []
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out", tmp_path / "one"}


def test_a_short_run_that_is_cut_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    file = recipe(tmp_path)
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "passed", lambda *given: (_ for _ in ()).throw(Cut()))
        with pytest.raises(Cut):
            carried_out(file, tmp_path / "out", [])
    assert set(tmp_path.iterdir()) == before


def test_states_in_a_file_come_back(tmp_path: Path, monkeypatch, at_every_layer) -> None:
    monkeypatch.setattr("octad.combine.states.IN_MEMORY", 0)
    monkeypatch.setattr("octad.combine.calibrate.SINGLY", 0)
    file = recipe(tmp_path)
    want = alone(file, tmp_path / "one")
    with monkeypatch.context() as patch:
        cut_after(patch, 1)
        with pytest.raises(Cut):
            carried_out(file, tmp_path / "out", [])
    same(carried_out(file, tmp_path / "out", []), want)


# ---- killed ------------------------------------------------------------------------------------------------------


def run(ranks: int, die_at: int, file: Path, out: Path) -> subprocess.CompletedProcess[str]:
    script = [
        cut_short.__file__,
        str(die_at),
        "combine",
        str(file),
        "-o",
        str(out),
        "--shard-size",
        "0.00002",
    ]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *script], capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def calls(done: subprocess.CompletedProcess[str]) -> int:
    return max(int(line) for line in done.stdout.splitlines() if line.isdigit())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "points"), [(1, 6), (2, 3), (3, 2)])
def test_killed_at_sampled_calls_it_ends_with_the_same_bytes(tmp_path: Path, ranks: int, points: int) -> None:
    file = recipe(tmp_path)
    want = alone(file, tmp_path / "one")
    before = set(tmp_path.iterdir())
    out = tmp_path / "out"
    done = run(ranks, 0, file, out)
    assert done.returncode == 0, done.stderr
    same(out, want)
    total, kept = calls(done), 0
    for point in range(points):
        subprocess.run(["rm", "-r", str(out)], check=True)
        killed = run(ranks, (2 * point + 1) * total // (2 * points), file, out)
        assert killed.returncode in (-signal.SIGKILL, 1)
        if not out.exists():
            done = run(ranks, 0, file, out)
            assert done.returncode == 0, done.stderr
            kept += "shards kept" in done.stderr
        same(out, want)
        assert set(tmp_path.iterdir()) == before | {out}
    assert kept
