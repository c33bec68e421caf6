"""What can be refused at once is refused before the members are measured, which takes seconds to minutes."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from members import make_base, make_recipe, text_file

from octad.combine import distances
from octad.combine.preflight import preflight
from octad.errors import DataError, OutputError


class Measured(Exception):
    """Raised in place of measuring."""


@pytest.fixture(autouse=True)
def _measuring_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any) -> None:
        raise Measured

    monkeypatch.setattr(distances, "measure", measure)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("order") / "base")


def recipe(base: Path, *data: Path) -> Any:
    return make_recipe(base, [{"name": f"m{e}", "model": "base", "data": str(d)} for e, d in enumerate(data)])


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    (tmp_path / "texts").mkdir()
    return [text_file(tmp_path / "texts", seed) for seed in range(2)]


def test_measuring_comes_last(base: Path, texts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Measured):
        preflight(recipe(base, *texts), tmp_path / "deep" / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]  # nothing was made


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_something_else(
    base: Path, texts: list[Path], tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name in ("m", "file", "file/m"):
        with pytest.raises(OutputError, match=f"{name}: "):
            preflight(recipe(base, *texts), tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_a_disk_that_is_too_small(
    base: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with pytest.raises(OutputError, match=r"m: [\d,]+ bytes are needed, 100 bytes are free"):
        preflight(recipe(base, *texts), tmp_path / "m")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody can make a directory")
def test_a_place_that_cannot_be_written(base: Path, texts: list[Path]) -> None:
    with pytest.raises(OutputError, match="/proc/m: "):
        preflight(recipe(base, *texts), "/proc/m")


def test_text_that_is_missing_is_said_before_a_base_is_looked_for(texts: list[Path], tmp_path: Path) -> None:
    """Which may mean to download it."""
    with pytest.raises(DataError, match=r"expert 'm1': .*no such file"):
        preflight(recipe(tmp_path / "no base", texts[0], tmp_path / "none.txt"))


def test_text(base: Path, texts: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for data, message in (("none.txt", "no such file"), ("empty.txt", "16 tokens or more")):
        with pytest.raises(DataError, match=f"expert 'm1': .*{message}"):
            preflight(recipe(base, texts[0], tmp_path / data), tmp_path / "m")
