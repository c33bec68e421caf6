"""Where and in which precision to compute: the choices that depend on the machine alone."""

from __future__ import annotations

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
