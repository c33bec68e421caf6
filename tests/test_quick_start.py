"""What a quick start leaves out of PyTorch: it stays out while a model answers, and comes when it is asked for."""

import subprocess
import sys

import torch

BEGIN = """
import sys
from octad.cli.quick_start import LATE, quick_start
quick_start()
import torch
def left_out():
    return {name for name in LATE if type(sys.modules.get(name)).__name__ == "_LazyModule"}
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_left_out_comes_when_it_is_asked_for() -> None:
    """Numbers drawn from a seed, shapes without memory, and the registrations themselves are those of a plain import."""
    code = """
from octad.engine.draw import generator
before = left_out()
drawn = torch.rand(3, generator=generator().manual_seed(7)).tolist()
shape = torch.nn.Linear(4, 6, device="meta")(torch.empty(2, 4, device="meta")).shape
import torch._meta_registrations as late
late.register_meta
print(sorted(before)[0], drawn, tuple(shape), "torch._meta_registrations" in left_out())
"""
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist()
    assert run(code).strip() == f"torch._meta_registrations {drawn} (2, 6) False"


def test_the_next_import_of_pytorch_is_as_ever() -> None:
    """Where PyTorch is there already, nothing is left out, and nothing stays behind that would look at later imports."""
    code = """
count = len(sys.meta_path)
quick_start()
print(len(sys.meta_path) == count, any("quick_start" in type(f).__module__ for f in sys.meta_path))
"""
    assert run(code).split() == ["True", "False"]
