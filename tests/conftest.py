"""Tiny random models of every family, saved by transformers itself; and what every test starts with."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Octad, Outcome, TinyCheckpoint, TinyModel, make_model

from octad.cli.main import main as cli


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Processes that share the tests among themselves must give them the same names, so no name may hold what was
    packed, drawn or timed while it was read: bytes are called by their argument (and numbered by pytest)."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Evaluations keep their results under a directory of this run, not in the user's cache. A machine under load is no
    reason for signs of life (report/life.py) among the lines that tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OCTAD_PULSE", "0")
        yield


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """tiny_model("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1) -> a transformers model"""
    return make_model


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """tiny_checkpoint(family, layout="hub" or "fused", shards=False, **config) -> the directory that transformers saved.

    Made once a session for equal arguments: read it, do not change it (copy it first).
    """
    made: dict[str, Path] = {}

    def make(family: str, layout: str = "hub", shards: bool = False, **changes: Any) -> Path:
        key = repr((family, layout, shards, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{layout}")
            make_model(family, **changes).save_pretrained(
                made[key], save_original_format=layout == "hub", max_shard_size="20KB" if shards else "5GB"
            )
        return made[key]

    return make


@pytest.fixture
def octad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Octad:
    """octad("inspect", path) -> (exit code, stdout, stderr), through main()."""
    torch.set_num_threads(1)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["octad", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return int(code), captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def _one_thread_in_training(request: pytest.FixtureRequest) -> Iterator[None]:
    """There the models are so small that more threads only wait for each other. Here and not in a conftest of that
    directory, which would take the name of this module, from which tests import."""
    before = torch.get_num_threads()
    if request.path.parent.name == "train":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
