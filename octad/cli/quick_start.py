"""PyTorch without what answering never asks for: a third of its import, left until somebody does ask.

    quick_start()                # before anything imports torch; `octad generate`, `chat` and `serve` do it

Python's own LazyLoader gives the modules of LATE their names and runs them at the first look inside. They describe
operations to PyTorch's compiler and to tensors without memory. That changes nothing but the time: what needs one of them
imports it, which runs it. (A generator of random numbers does not say so: engine/draw.py.)
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

LATE = frozenset({"torch._meta_registrations", "torch.distributed._meta_registrations", "torch._native"})


class _Late(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module of LATE lies, to be run at the first look inside."""
        spec = PathFinder.find_spec(fullname, path) if fullname in LATE else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def quick_start() -> None:
    """Import PyTorch, unless it is there, without the modules of LATE and without asking every installed package for a
    device of its own: octad knows CPUs and CUDA, which need none."""
    if "torch" in sys.modules:
        return
    finder = _Late()
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    sys.meta_path.insert(0, finder)
    try:
        import torch  # noqa: F401
    finally:
        sys.meta_path.remove(finder)
