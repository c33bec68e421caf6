"""Two processes, as torchrun starts them, give the numbers of one: windows dealt out, gathered on the first."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from judging import World

from octad.checkpoint.load import open_source
from octad.evaluate.compare import Settings, compare


def evaluated_by_two(world: World, directory: Path) -> dict[str, Any]:
    """The report of a command in two processes of its own."""
    data = directory / "domains.yaml"
    data.write_text(yaml.safe_dump({"domains": {d: [str(f) for f in fs] for d, fs in world.domains.items()}}))
    options = ["--data", data, "--tokens", 150, "--window", 48, "--no-card", "--json"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "octad.cli", "evaluate", world.mixture, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"OCTAD_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)  # one report, from the first rank alone
    return found


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world = World(tmp_path / "world", "llama")
    alone = compare(open_source(world.mixture), world.domains, Settings(150, 48))
    together = evaluated_by_two(world, tmp_path)
    rows = {row["name"]: row for row in together["contestants"]}
    assert list(rows) == list(alone.rows)
    for name, row in rows.items():
        assert row["nats_per_token"] == pytest.approx(alone.nats[name], rel=2e-3)
    for domain, shares in together["load"].items():
        assert shares == pytest.approx(alone.shares(domain), abs=2e-2)
    assert len(list((tmp_path / "cache" / "evaluate").iterdir())) == 8  # each contestant once
