"""`octad evaluate --tasks` through main(): tables, JSON, and every mistake as one line with exit code 2."""

import json
from pathlib import Path

import pytest
import torch
from judging import World
from tiny_models import Octad

from octad.errors import SandboxError
from octad.sandbox.run import Sandbox

CODE = {"task_id": "t/0", "prompt": "def f():\n", "test": "def check(f):\n    assert f()", "entry_point": "f"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("tasks-cli"), "llama")


def quiz(directory: Path) -> Path:
    file = directory / "quiz.jsonl"
    lines = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": n % 2} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_table_with_every_member(world: World, octad: Octad, tmp_path: Path) -> None:
    code, out, _ = octad("evaluate", world.mixture, "--tasks", quiz(tmp_path), "--members")
    assert code == 0
    assert "quiz: acc, 4 examples, guessing 0.500; 95 % intervals" in out
    for part in ("general", "lora", "full", "far", "soup", "mixture top-2 less this"):
        assert part in out


def test_json_and_tasks_beside_data(world: World, octad: Octad, tmp_path: Path) -> None:
    domains = tmp_path / "domains.yaml"
    domains.write_text(json.dumps({"domains": {"one": str(world.domains["one"][0])}}))
    code, out, _ = octad("evaluate", world.base, "--tasks", quiz(tmp_path), "--json")
    assert code == 0
    assert [row["metric"] for row in json.loads(out)["tasks"]] == ["acc", "acc_norm"]
    code, out, _ = octad("evaluate", world.base, "--tasks", quiz(tmp_path), "--data", domains, "--tokens", 64)
    assert code == 0
    assert "bits per byte" in out
    assert "quiz: acc" in out


def test_programs_run_and_the_walls_are_told(world: World, octad: Octad, tmp_path: Path) -> None:
    try:
        Sandbox()
    except SandboxError as error:
        pytest.skip(f"programs cannot be confined here: {error}")
    file = tmp_path / "code.yaml"
    file.write_text(
        json.dumps({"kind": "code", "max_tokens": 4, "examples": [CODE, CODE | {"task_id": "t/1"}]})
    )
    code, out, _ = octad("evaluate", world.base, "--tasks", file, "--samples", 2)
    assert code == 0
    for part in ("code: pass@1, 2 examples", "code: pass@2", "programs ran behind walls (files: landlock"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["nothing to judge on", "--tasks octad-code"]),
        (["--tasks", "octad-cod"], ["octad-cod: no such task", "octad-code"]),
        (["--tasks", ","], ["--tasks: names no task"]),
        (["--tasks", "missing.yaml"], ["missing.yaml: cannot be read"]),
        (["--tasks", "octad-choice", "--members"], ["is dense, it has no members"]),
        (["--tasks", "octad-choice", "--limit", "0"], ["--limit"]),
    ],
)
def test_mistakes_are_one_line(world: World, octad: Octad, arguments: list[str], parts: list[str]) -> None:
    code, out, err = octad("evaluate", world.base, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert all(part in err for part in parts)
