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
from tiny_models import Octad

from octad import dist
from octad.checkpoint.load import open_source
from octad.errors import RequestError
from octad.evaluate.compare import Settings, compare
from octad.evaluate.judge import must_spread


def run_ranks(world: World, directory: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """A command in processes of its own."""
    data = directory / "domains.yaml"
    data.write_text(yaml.safe_dump({"domains": {d: [str(f) for f in fs] for d, fs in world.domains.items()}}))
    options = ["--data", data, "--tokens", 150, "--window", 48, "--no-card", "--json", *more]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(port), "-m"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "octad.cli", "evaluate", world.mixture, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"OCTAD_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"},
    )


def equal_to_one(tmp_path: Path, ranks: int, family: str, *more: str) -> str:
    """Every figure; what was said beside it is returned."""
    torch.set_num_threads(1)
    world = World(tmp_path / "world", family)
    alone = compare(open_source(world.mixture), world.domains, Settings(150, 48))
    done = run_ranks(world, tmp_path, ranks, *more)
    assert done.returncode == 0, done.stderr
    together: dict[str, Any] = json.loads(done.stdout)  # one report, from the first rank alone
    rows = {row["name"]: row for row in together["contestants"]}
    assert list(rows) == list(alone.rows)
    for name, row in rows.items():
        assert row["nats_per_token"] == pytest.approx(alone.nats[name], rel=2e-3)
    for domain, shares in together["load"].items():
        assert shares == pytest.approx(alone.shares(domain), abs=2e-2)
    assert len(list((tmp_path / "cache" / "evaluate").iterdir())) == 8  # each contestant once
    return done.stderr


def test_two_ranks_give_the_numbers_of_one(tmp_path: Path) -> None:
    equal_to_one(tmp_path, 2, "llama")


def test_spread_contestants_are_those_that_one_process_holds(tmp_path: Path) -> None:
    """Over a group of one rank, where nothing travels: members inside the mixture, one that is a model of its own, the
    soup as a model of its own, batches with nothing to read."""
    torch.set_num_threads(1)
    world = World(tmp_path / "world", "llama")
    alone = compare(open_source(world.mixture), world.domains, Settings(150, 48))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        spread = compare(open_source(world.mixture), world.domains, Settings(150, 48), spread=True)
    finally:
        torch.distributed.destroy_process_group()
    assert list(spread.rows) == list(alone.rows)
    for name in alone.rows:
        assert spread.nats[name] == pytest.approx(alone.nats[name], rel=2e-3)
    assert spread.shares("one") == pytest.approx(alone.shares("one"), abs=2e-2)


def test_who_has_to_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(World(tmp_path / "world", "llama").mixture)
    with pytest.raises(RequestError, match="--shard: needs several processes; torchrun"):
        must_spread(source, dist.World(), asked=True)
    two = dist.World(0, 2)
    assert not must_spread(source, dist.World())
    assert [must_spread(source, two), must_spread(source, two, asked=True)] == [False, True]
    monkeypatch.setattr("octad.fast.spread.rank_memory", lambda device: 1000)
    assert [must_spread(source, two), must_spread(source, two, asked=False)] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "family"), [(2, "llama"), (3, "llama"), (4, "qwen3"), (2, "qwen2")])
def test_weights_over_several_ranks_give_the_numbers_of_one(tmp_path: Path, ranks: int, family: str) -> None:
    """Experts and layers dealt out; over three, experts do not divide: FSDP cuts them too."""
    said = equal_to_one(tmp_path, ranks, family, "--shard")
    assert said.count(f"every model's weights lie over {ranks} processes") == 1


@pytest.mark.slow
def test_what_one_rank_finds_wrong_is_one_line(tmp_path: Path) -> None:
    world = World(tmp_path / "world", "llama")
    weights = world.mixture / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64])
    done = run_ranks(world, tmp_path, 2, "--shard")
    assert done.returncode != 0
    assert done.stderr.count("octad: ") == 1
    assert 'Traceback (most recent call last):\n  File "<string>"' not in done.stderr
    weights.write_bytes(whole)
    done = run_ranks(world, tmp_path, 2, "--shard", "--tasks", "octad-chat")
    assert "answers come from one process" in done.stderr


def test_only_one_process_answers(octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in (("generate", "mixture", "a"), ("bench", "mixture")):
        code, _, err = octad(*verb)
        assert code == 2
        assert "octad's engine runs in one process" in err
