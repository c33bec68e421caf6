"""How the compiled libraries are called: argument types, numbers' types, and what a failure becomes.

linear = typed(library.octad_linear, [POINTER, INT, FLOAT])
check(linear(x.data_ptr(), DTYPES[x.dtype], 0.5))
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # F_F32 and F_BF16 of native_src/rows.h


def typed(function: Any, arguments: list[Any]) -> Any:
    """The library's function, told what it takes."""
    function.argtypes = arguments
    return function


def check(failed: int) -> None:
    """Raises for what a kernel returns: IndexError for 2, MemoryError for any other but 0."""
    if failed == 2:
        raise IndexError("a token was sent to an expert that is not there")
    if failed:
        raise MemoryError("the native kernels ran out of memory")
