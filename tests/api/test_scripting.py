"""What scripts rely on: exit codes, the last line as JSON, quiet and loud, what an interruption leaves."""

import json
import logging
from pathlib import Path

import pytest
import torch
from own_text import world
from tiny_models import Octad


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return world(tmp_path_factory.mktemp("scripts"))


def last(out: str) -> dict[str, object]:
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_the_last_line_is_json(place: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every command that makes something; what it names is there."""
    monkeypatch.chdir(place)
    for command in (
        ("combine", "recipe.yaml", "-o", "mixture"),
        (
            "expert",
            "replace",
            "mixture",
            "--name",
            "two",
            "--model",
            "one",
            "--data",
            "one.jsonl",
            "-o",
            "edited",
        ),
        ("expert", "remove", "edited", "--name", "one"),
        ("quantize", "mixture", "-o", "int8"),
        ("export", "mixture", "-o", "exported", "--untie"),
        ("train", "tune.yaml", "-o", "tuned"),
        ("branch", "branch.yaml", "-o", "specialists"),
    ):
        code, out, err = octad(*command, "--json")
        assert (code, command[0]) == (0, command[0]), err
        made = last(out)
        assert Path(str(made["output"])).exists()
        assert isinstance(made["seconds"], float)
        assert f"wrote {made['output']}" in out.splitlines()[-2]
    again = octad("combine", "recipe.yaml", "-o", "mixture")
    assert (again[0], again[2].count("\n")) == (2, 1)
    assert "--overwrite replaces an earlier model" in again[2]
    assert "specialists/recipe.yaml" in octad("branch", "branch.yaml", "-o", "specialists")[2]
    assert octad("combine", "specialists/recipe.yaml", "-o", "of-branch")[0] == 0


def test_quiet_and_loud(place: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    old = place / "old.yaml"
    old.write_text(json.dumps({"domains": {"one": {"files": "one.jsonl"}}}))
    arguments = ("evaluate", "base", "--data", "old.yaml", "--tokens", 64, "--window", 32)
    code, _, err = octad(*arguments)
    assert (code, err) == (0, "octad: old.yaml: 'files' is called 'data' here\n")
    assert octad(*arguments, "-q")[2] == ""
    code, out, err = octad("-q", "combine", "recipe.yaml", "-o", "silent")
    assert (code, err, "members beside base" in out, "wrote" in out) == (0, "", True, False)
    assert octad("--quiet", "inspect", "nowhere")[2].startswith("octad: nowhere: no such file")
    level = logging.getLogger("octad").level
    try:
        err = octad("inspect", "nowhere", "-v")[2]
    finally:
        logging.getLogger("octad").setLevel(level)
        logging.basicConfig(level=logging.WARNING, force=True)
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("octad: nowhere")
    assert octad("inspect", "base", "--", "-q")[0] == 2  # behind -- it is no flag


def test_an_interruption_says_what_is_left(
    place: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr("octad.project.road.make", stop)
    monkeypatch.setattr("octad.api.verbs.check", stop)
    code, _, err = octad("make", "mine")
    assert code == 130
    assert err.endswith("s; stages that are done are kept, and the same command goes on\n")
    assert octad("combine", "recipe.yaml", "-o", "x")[2].endswith("s; nothing was written\n")


def test_what_trains_is_looked_at_before_the_model_is_loaded(
    place: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("octad.api.verbs.bars", lambda *args: pytest.fail("nothing should have begun"))
    for name, change in (("tune", {"model": "base"}), ("branch", {})):
        raw = json.loads((place / f"{name}.yaml").read_text()) | change
        rows = raw["data"]["sources"] if name == "tune" else raw["experts"]
        rows[-1]["data"] = ["two.jsonl", "none/*.jsonl"]
        (place / f"bad-{name}.yaml").write_text(json.dumps(raw))
        code, _, err = octad("train" if name == "tune" else name, f"bad-{name}.yaml", "-o", "bad")
        assert (code, err.count("\n")) == (2, 1)
        assert "two" in err
        assert "none/*.jsonl: no such file" in err
