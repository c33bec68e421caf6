"""Two processes, as torchrun starts them, give the numbers of one: windows dealt out, gathered on the first."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from judging import World

from octad.evaluate.ranks import Ranks


def evaluate(world: World, directory: Path, *launcher: str) -> dict[str, dict[str, float]]:
    """Figures of every contestant, from a command in processes of its own."""
    data = directory / "domains.yaml"
    data.write_text(yaml.safe_dump({"domains": {d: [str(f) for f in fs] for d, fs in world.domains.items()}}))
    options = ["--data", data, "--tokens", 150, "--window", 48, "--no-card", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "octad.cli", "evaluate", world.mixture, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OCTAD_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one report, from the first rank alone
    assert found["load"]["one"]
    return {c["name"]: c["nats_per_token"] for c in found["contestants"]} | {"load": found["load"]}


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    world = World(tmp_path / "world", "llama")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = evaluate(world, tmp_path / "one")
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29641", "-m")
    together = evaluate(world, tmp_path / "two", *launcher)
    assert list(alone) == list(together)
    for name, row in alone.items():
        for domain, value in row.items():
            assert together[name][domain] == pytest.approx(value, rel=2e-3)


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Ranks.joined() as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.from_first({"a": 1}) == {"a": 1}
        assert ranks.largest(2.5) == 2.5
