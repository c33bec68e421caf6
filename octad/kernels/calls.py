"""How the compiled library is called: argument types, numbers' types, and what a failure becomes.

linear = library.function("linear", [POINTER, INT, FLOAT])      # a Library of compile.py
check(linear(x.data_ptr(), DTYPES[x.dtype], 0.5))
"""

from __future__ import annotations

import ctypes

import torch

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # F_F32 and F_BF16 of native_src/numbers.h


def check(failed: int) -> None:
    """Raises for what a kernel returns: IndexError for 2, MemoryError for any other but 0."""
    if failed == 2:
        raise IndexError("a token was sent to an expert that is not there")
    if failed:
        raise MemoryError("the native kernels ran out of memory")
