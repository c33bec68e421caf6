"""Where and in which precision to compute: the choices that depend on the machine alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import torch


def compute_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32 (CUDA, AVX-512 BF16, AMX), float32 elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """True where the CPU has bfloat16 dot products (AVX512_BF16 or AMX)."""
    return _cpu_has("avx512_bf16", "amx_bf16")


def _cpu_has(*names: str) -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in names)


def emulation(dtype: torch.dtype, device: torch.device | str = "cpu") -> str | None:
    """One line for the user where PyTorch multiplies in `dtype` on an x86 CPU that has no instructions for it, by
    converting; None where it has them, or where nobody knows. Native kernels that widen by themselves are not meant."""
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    native = {torch.bfloat16: cpu_has_bfloat16(), torch.float16: _cpu_has("avx512_fp16", "amx_fp16")}
    if native.get(dtype, True):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"{name} is emulated on this CPU, which has no instructions for it: float32 is many times faster"


def product_rate(
    dtype: torch.dtype, device: torch.device | str = "cpu", seconds: float = 0.15, side: int = 1024
) -> float:
    """The best rate of square matrix products here and now, FLOP/s, measured in about `seconds` on any machine.

    The sides double from 64 to `side` while the time lasts: a CPU that emulates the dtype gets no further than small
    ones, a fast one is judged by large ones. The second factor is transposed, as in a linear layer. No random number is
    drawn: a resumed run counts them."""
    best, size, until = 0.0, 64, time.perf_counter() + seconds
    while True:
        a = torch.full((size, size), 0.5, dtype=dtype, device=device)
        took = math.inf
        for _ in range(3):  # the first also pays for getting ready
            begun = time.perf_counter()
            float((a @ a.T)[0, 0])  # reading a value waits for the device
            took = min(took, time.perf_counter() - begun)
            if time.perf_counter() + took > until:
                break
        best = max(best, 2 * size**3 / took)
        left = until - time.perf_counter()
        if size < side and 10 * took < left:  # eight times the work, and some for getting ready
            size *= 2
        elif took > left:
            return best


def keep_freed_memory(any_size: bool = False) -> None:
    """Ask glibc to reuse freed blocks up to 32 MB (or of any size) instead of returning them to the system each time.

    PyTorch allocates every activation afresh; with glibc's defaults each one of a few MB is mapped, zeroed page by page
    and unmapped again, which on virtual machines costs as much as the arithmetic. `any_size` is for work that asks for
    the same blocks again and again, as training does: a step of `repair` takes 9 % less. For glibc alone."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library that is not glibc
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
    mallopt(-1, -1 if any_size else 256 << 20)  # M_TRIM_THRESHOLD; -1: nothing goes back
    if any_size:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Inside, CPU products of float32 matrices round the factors to bfloat16 and add up in float32: twice as fast.

    Nothing is lost where the factors were bfloat16 before."""
    setting = cast(Any, torch.backends.mkldnn).matmul
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def spare_the_collector() -> None:
    """Have Python's garbage collector look at new objects alone: what importing and loading has made stays, and looking
    through it again and again costs some per cent of a decoding step. For a process that keeps what it has loaded."""
    gc.collect()
    gc.freeze()
