"""torch.compile where it helps: the many small operations between the matrix products become one pass each.

    compile_model(model, "auto", device, work=1e15, echo=print)  # before the first step; True where it was done

Norms, dense feed-forward networks and the rotation of queries and keys are compiled; the products themselves are the
library's either way, and attention, experts and loss have backwards of their own. On CPUs blocks.py has done most of it
before, without a compiler's half minute: what is left there are norms of heads and networks with biases. "auto" compiles
on GPUs, where the run is long enough to win that back and PyTorch can (Triton). Shapes are static, so that a resumed run
computes the same bits; judging runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from octad.errors import RecipeError
from octad.model.moe import MLP
from octad.model.rope import rotated
from octad.model.transformer import RMSNorm, Transformer

Wanted = Literal["auto", True, False]
AUTO = ("cuda",)  # where much is left to compile
ENOUGH = 1e14  # operations of a whole run from which the seconds saved are more than those of compiling


def compile_model(
    model: Transformer, wanted: Wanted, device: torch.device, *, work: float, echo: Callable[[str], None]
) -> bool:
    """Compile the model's small parts in place. Raises RecipeError where it is asked for and cannot be done."""
    if wanted is False or (wanted == "auto" and (device.type not in AUTO or work < ENOUGH)):
        return False
    if reason := cannot_compile(device):
        if wanted is True:
            raise RecipeError(f"compile: PyTorch cannot compile here ({reason}); set compile: auto or false")
        echo(f"not compiled: PyTorch cannot compile here ({reason})")
        return False
    for module in model.modules():
        if isinstance(module, (RMSNorm, MLP)):
            module.compile(dynamic=False)
    if model.model.rope.apply is rotated:  # on CPUs blocks.py has put another one there
        model.model.rope.apply = torch.compile(rotated, dynamic=False)
    echo("compiling what lies between the products (compile: false does without)")
    return True


def cannot_compile(device: torch.device) -> str:
    """Why a trivial function cannot be compiled and run, in one line; nothing where it can."""
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing or broken compiler raises
        first = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first}"
    return ""


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x + 1
