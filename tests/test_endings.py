"""How commands end where the system has a say: signals, names that no file can have, streams of other encodings."""

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from members import make_base, text_file
from tiny_models import Octad

from octad.checkpoint.config_file import read_mapping
from octad.errors import OutputError, RecipeError
from octad.staging import StagedDirectory

LONG = "n" * 300  # file systems take 255
FOREIGN = os.fsdecode(b"caf\xe9")  # Latin-1, as a path from another machine


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endings")
    text = text_file(directory, 1)
    (directory / "base.yaml").write_text(f"domains: {{one: {text.name}}}")
    return make_base(directory / "base")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_nothing_behind(
    base: Path,
    octad: Octad,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    """In the middle of writing: the exit code is what a shell makes of it (bash: 128 + n), and handlers are as before."""
    before = signal.getsignal(number)
    begun: list[list[str]] = []

    def ended(self: StagedDirectory) -> Path:
        begun.append(os.listdir(tmp_path))
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(StagedDirectory, "commit", ended)
    found = octad("export", base, "-o", tmp_path / "out")
    assert found[0] == code
    assert found[2].startswith(f"octad: ended by {number.name}; nothing was written")
    assert len(begun[0]) == 1
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(number) is before


def test_an_ignored_signal_stays_ignored(base: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup starts a command."""
    import octad.checkpoint.load as load

    whole = load.open_source

    def hung_up(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return whole(*args, **options)

    monkeypatch.setattr(load, "open_source", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert octad("inspect", base)[0] == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "command",
    [
        ["combine", LONG, "-o", "x"],
        ["quantize", "{base}", "--to", "int8", "-o", LONG],
        ["export", "{base}", "-o", LONG],
        ["export", "{base}", "--to", "gguf", "-o", LONG],
        ["evaluate", "{base}", "--tasks", LONG],
        ["evaluate", "{base}", "--data", "{base}.yaml", "--report", LONG],
        ["init", LONG, "--expert", "a={base}", "--base", "{base}"],
        ["make", LONG],
        ["chat", LONG],
        ["inspect", FOREIGN],
        ["quantize", "{base}", "--to", "int8", "-o", FOREIGN],
    ],
    ids=lambda command: f"{command[0]}-{len(command)}",
)
def test_names_that_cannot_be(
    command: list[str], base: Path, octad: Octad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = octad(*(word.format(base=base) for word in command))
    assert (code, out) == (2, "")
    assert err.startswith("octad: ")
    assert len(err.splitlines()) == 1
    assert "nnnn" in err or "caf\\udce9" in err
    assert os.listdir(tmp_path) == []


def test_an_output_whose_place_is_no_utf8(tmp_path: Path) -> None:
    """Where nobody typed the name: the directory that one stands in."""
    with pytest.raises(OutputError, match="no UTF-8"):
        StagedDirectory(tmp_path / FOREIGN / "mixture")


def test_a_stream_that_lacks_our_characters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of another alphabet: what it lacks is written as Python writes it, and the rest as it is."""
    from octad.cli.main import main

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["octad", "inspect", str(base)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    told = raw.getvalue()
    assert b"base \\xb7 llama" in told
    assert b"\xc2" not in told


def test_no_stdin_at_all(octad: Octad, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    code, _, err = octad("init", tmp_path / "mine")
    assert code == 2
    assert err.startswith("octad: no experts given")


def test_a_terminal_of_no_width_is_none(base: Path, octad: Octad, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = octad("inspect", base)[1]
    monkeypatch.setenv("COLUMNS", "0")
    assert octad("inspect", base)[1] == plain
    assert "llama" in plain


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a file without end")
def test_a_file_without_end_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"recipe.*bytes"):
        read_mapping(Path("/dev/zero"), "recipe", "base")
