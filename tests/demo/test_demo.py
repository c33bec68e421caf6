"""octad demo as a newcomer sees it, on tiny models: what it says, how much of it, and that its last lines work."""

import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from judging import World
from tiny_models import Octad

from octad.demo import demo
from octad.report import terminal


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("demo"), "llama")


@pytest.fixture
def place(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a demo of four tiny models lies; the terminal has 80 columns."""
    texts = {name: str(files[0]) for name, files in world.domains.items()}
    experts = [
        {"name": name, "model": "base" if name == "general" else str(path), "data": texts["one"]}
        for name, path in world.models.items()
    ]
    recipe = {"base": str(world.base), "experts": experts, "router": {"tokens": 200, "window": 64}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "domains.yaml").write_text(yaml.safe_dump({"domains": texts}))
    monkeypatch.setattr(demo, "HERE", tmp_path)
    monkeypatch.setattr(demo, "TOKENS", 60)
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(terminal.out, "width", 80)
    monkeypatch.setenv("OCTAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_demo_is_told_in_a_screen_or_two(place: Path, octad: Octad) -> None:
    code, out, err = octad("demo")
    assert (code, err.count("Traceback")) == (0, 0)
    lines = out.splitlines()
    assert len(lines) < 100
    ours = [line for line in out.partition("3. What")[0].splitlines() if str(place) not in line]
    assert max(map(len, ours)) <= 80  # but paths, which are to be copied, and what the model writes
    assert "…" not in out
    told = " ".join(out.split())
    for first, then in pairwise(ORDER):
        assert told.index(first) < told.index(then), then
    tried = [line.strip() for line in out.partition("Three things to try")[2].splitlines()]
    tried = [line for line in tried if line.startswith("octad ")]
    assert len(tried) == 3
    assert tried[0].startswith(("octad serve", "octad chat"))
    assert (place / "demo-output-report" / "index.html").is_file()
    for line in tried[1:]:
        code, _, err = octad(*shlex.split(line)[1:], *(["--tokens", "60"] if "evaluate" in line else []))
        assert code == 0, (line, err)


ORDER = [
    "min on this machine, and",
    "1. One mixture out of eight models",
    "no weight of the models changes",
    "2. Is it better than its parts?",
    "the best of its parts",
    "oracle: the best part for each kind of text",
    "3. What does it write?",
    "def is_prime(n):",
    "Three things to try",
]


def test_quiet_leaves_prose_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet in (False, True):
        monkeypatch.setattr(terminal.err, "quiet", quiet)
        demo.heading("1. One mixture")
        demo.tell("Each model becomes an expert.")
        terminal.remark("wrote demo-output")
        terminal.say("a result")
        out = capsys.readouterr().out
        assert [text in out for text in ("One mixture", "becomes", "wrote", "a result")] == [
            *[not quiet] * 3,
            True,
        ]


def test_what_octad_did_not_make_is_left_alone(place: Path, octad: Octad) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "diary.txt").write_text("dear diary")
    code, out, err = octad("demo", "-o", "mine")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "holds something that octad did not make" in err
    assert (place / "mine" / "diary.txt").read_text() == "dear diary"
