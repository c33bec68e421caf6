"""What this machine can do at most, measured: how fast it reads memory, how fast it multiplies matrices.

    limits = Limits(torch.device("cpu"))
    limits.probe()                      # several times through a run: a shared machine has good and bad moments
    limits.report()["read"]["best"]     # bytes a second

Decoding one token reads every active weight once, so it is bound by reading; a long prompt is bound by multiplying. A
speed is worth stating only as a share of these (MBU, MFU), taken in the same run with the same threads. Each limit is
the best of its probes: a probe can be too slow (a neighbour, a cold clock), never too fast. On a shared machine memory
can be twice as fast at one time as at another, so that a contestant is judged by the probes taken while it was measured.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octad import portable
from octad.dist import product_rate

READ_BYTES = 256 << 20  # far more than any last-level cache of a small machine
READ_BYTES_CUDA = 2 << 30
SIDE, SIDE_CUDA = 2048, 8192  # of the square matrices, at most; an accelerator needs larger ones to be busy
PROBE_SECONDS = 0.5  # for products of one dtype: a CPU that emulates it gets no further than small matrices
ALL = slice(None)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)


class Limits:
    """Probes of read bandwidth (bytes/s: the sum over a float32 array) and of matrix products (FLOP/s, by dtype)."""

    def __init__(self, device: torch.device, read_bytes: int | None = None, side: int | None = None) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.read_bytes = read_bytes or (READ_BYTES_CUDA if cuda else READ_BYTES)
        self.side = side or (SIDE_CUDA if cuda else SIDE)
        self.read: list[float] = []
        self.matmul: dict[str, list[float]] = {name: [] for name in DTYPES}

    def probe(self, repeats: int = 3) -> None:
        """Measure each limit `repeats` times, and let go of the memory that it took."""
        array = torch.ones(self.read_bytes // 4, device=self.device)
        self.read += [self.read_bytes / s for s in self._seconds(array.sum, repeats)]
        del array
        for name, dtype in DTYPES.items():
            self.matmul[name] += [
                product_rate(dtype, self.device, PROBE_SECONDS, self.side) for _ in range(repeats)
            ]

    def read_now(self) -> float:
        """The read bandwidth at this moment, bytes/s; not one of the probes."""
        array = torch.ones(self.read_bytes // 4, device=self.device)
        return self.read_bytes / min(self._seconds(array.sum, 2))

    def _seconds(self, work: Callable[[], Any], repeats: int) -> list[float]:
        times = []
        for _ in range(repeats + 1):
            synchronise(self.device)
            begun = time.perf_counter()
            work()
            synchronise(self.device)
            times.append(time.perf_counter() - begun)
        return times[1:]

    def bandwidth(self, probes: slice = ALL) -> float:
        """The best read bandwidth of these probes, bytes/s."""
        return max(self.read[probes])

    def peak(self, dtype: str, probes: slice = ALL) -> float | None:
        """The best matrix product of these probes in this dtype, FLOP/s; None for a dtype that is not measured."""
        return max(self.matmul[dtype][probes]) if dtype in self.matmul else None

    def report(self) -> dict[str, Any]:
        """Best and all probes, in the order taken."""
        return {
            "read_bytes_per_s": {"best": self.bandwidth(), "array_bytes": self.read_bytes, "all": self.read},
            "matmul_flops_per_s": {
                name: {"best": max(found), "side": self.side, "all": found}
                for name, found in self.matmul.items()
            },
        }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> dict[str, Any]:
    """CPU model, cores, instruction sets, memory, threads used, load; the GPU where it is used."""
    fields = _cpuinfo()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found: dict[str, Any] = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_bytes": portable.memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "scheduling": _scheduling(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return found


def _scheduling() -> str:
    """ "real-time" where other programs wait for this one (chrt: to measure on a machine that has other work)."""
    if not hasattr(os, "sched_getscheduler"):
        return "shared"
    return "real-time" if os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO) else "shared"


def memory_of(pid: int | str = "self") -> dict[str, int]:
    """A process's resident bytes now (`resident`) and at most so far (`peak`); {} where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    wanted = {"VmRSS": "resident", "VmHWM": "peak"}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {wanted[key]: int(value.split()[0]) * 1024 for key, value in pairs if key in wanted}


def available_memory() -> int | None:
    """Bytes that can be taken without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
