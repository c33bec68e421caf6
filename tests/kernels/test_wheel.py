"""The wheel, installed where there is no compiler."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import octad
from octad.kernels.compile import runnable

ROOT = Path(octad.__file__).parents[1]
CODE = """
import torch
from pathlib import Path
from octad.kernels import compile as build
from octad.kernels.native import NativeKernels, describe
from octad.kernels.packed import linear_reference, pack

torch.manual_seed(0)
library = build.load()
kernels, weight, x = NativeKernels(library), pack(torch.randn(48, 128), 8), torch.randn(5, 128)
torch.testing.assert_close(kernels.linear(describe([weight]), x)[0], linear_reference(x, weight), rtol=1e-5, atol=1e-5)
runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
print(Path(build.__file__).parent, library.isa, bool(kernels.features & 4), len(runtimes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_wheel_needs_no_compiler(tmp_path: Path) -> None:
    """It brings the library, has this machine's best path and PyTorch's own OpenMP runtime, and compiles nothing."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # building leaves files behind
    shutil.copytree(ROOT / "octad", source / "octad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("octad-*.whl")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))  # all but octad comes from here
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CC", "OCTAD_ISA")}
    run = subprocess.run(
        [python, "-c", CODE],
        env={**clean, "PATH": str(nothing), "OCTAD_CACHE": str(nothing)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    where, isa, openmp, runtimes = run.stdout.split()
    assert Path(where).is_relative_to(site)
    assert isa == runnable()[0]
    assert (openmp, runtimes) == ("True", "1")
    assert list(nothing.iterdir()) == []
