"""Two processes over gloo take the steps that one takes, and either goes on from the other's state."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import checkpoint, tune_file

from octad.errors import RecipeError
from octad.train.parallel import World

SETTINGS = {
    "mode": "all",
    "log_every": 1,
    "save": {"every": 4},
    "optimizer": {"name": "muon", "lr": 0.01},
    "routing": {"balance": 0.01, "bias": 1e-3},
    "batch": {"windows": 4, "micro": 2},
}


def run(file: Path, out: Path, ranks: int) -> None:
    launch = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    )
    command = [sys.executable, *launch, "-m", "octad.cli", "train", str(file), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_equal_one_and_exchange_states(tiny_checkpoint, tmp_path: Path) -> None:
    mixture = checkpoint(tiny_checkpoint("mixtral", num_local_experts=4), tmp_path / "mixture")
    whole, half = tune_file(tmp_path, mixture, **SETTINGS), tune_file(tmp_path, mixture, **SETTINGS)
    run(whole, tmp_path / "one", 1)
    run(half, tmp_path / "two", 2)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3, atol=1e-3)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=5e-3, msg=name)
    longer = tune_file(tmp_path, mixture, **SETTINGS | {"steps": 12})
    run(longer, tmp_path / "one", 2)
    run(longer, tmp_path / "two", 1)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=5e-3, atol=5e-3)
    assert len(losses(tmp_path / "one")) == 12


def test_pieces_are_dealt_out_evenly() -> None:
    dealt = [World(rank, 2).share("abcd") for rank in range(2)]
    assert dealt == [["a", "c"], ["b", "d"]]
    with pytest.raises(RecipeError, match="3 micro-batches a step cannot be dealt out to 2 processes"):
        World(0, 2).share("abc")
