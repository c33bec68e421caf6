"""Where and in which precision to compute: the choices that depend on the machine alone."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
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
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


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
