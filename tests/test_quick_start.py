"""What a quick start leaves out of PyTorch: it stays out while a model answers, and comes when it is asked for."""

import subprocess
import sys

import numpy as np
import torch
from tiny_models import TinyCheckpoint

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


def test_rounding_to_4_bits_asks_for_none_of_it(tiny_checkpoint: TinyCheckpoint) -> None:
    """The ids that are drawn for it are those of PyTorch's own generator."""
    path = str(tiny_checkpoint("mixtral", dtype=torch.bfloat16))
    code = f"""
from octad.checkpoint.load import open_source
from octad.fast.loading import open_fast
before = left_out()
model, _ = open_fast(open_source({path!r}), torch.float32, quantize="int4")
print(left_out() == before, bool(model(torch.arange(9)[None]).isfinite().all()))
"""
    assert run(code).split() == ["True", "True"]
    drawn = np.random.RandomState(0).randint(0, 1 << 32, (1, 128), dtype=np.uint32)
    expected = torch.randint(49152, (1, 128), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.from_numpy(drawn.astype(np.int64) % 49152), expected)
