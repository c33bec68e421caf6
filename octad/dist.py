"""Where, in which precision and with whom to compute: the choices that depend on the machine and on torchrun alone.

    device, dtype = own_device(), compute_dtype()
    world = World.join()                         # torchrun --nproc-per-node 2 -m octad train tune.yaml -o tuned/

A World is this process among the others of one run; a World of one does nothing. Those who train draw the same global
batch on every rank, compute every size-th micro-batch of it, and add up gradients, loss and expert loads before the step,
so that all ranks take the step that one process would, within rounding; how weights lie on the ranks is
fast/spread.py's. Those who judge compute every size-th window and add up one number a token.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from octad.errors import OctadError, RecipeError

T = TypeVar("T")


def own_device() -> torch.device:
    """This process's GPU, of several that torchrun started on one machine each its own; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def dtype_name(dtype: torch.dtype) -> str:
    """As configs and people write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


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
    name = dtype_name(dtype)
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
            if size > 64 and time.perf_counter() + took > until:
                break  # the smallest is timed thrice, in case that others had the processor meanwhile
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


@contextlib.contextmanager
def one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """As many threads as PyTorch has, whose operations take one each: for work that falls into parts which share nothing.
    One small operation after the other over all cores would mostly wait for the slowest of them."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # PyTorch gives later threads what was set last


def spare_the_collector() -> None:
    """Have Python's garbage collector look at new objects alone: what importing and loading has made stays, and looking
    through it again and again costs some per cent of a decoding step. For a process that keeps what it has loaded."""
    gc.collect()
    gc.freeze()


class LostProcess(OctadError):
    """An exchange with another process of the run failed: it died, or its machine did."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> World:
        """The world that torchrun's environment describes; one process without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(own_device())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(dist.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """True on the rank that writes and speaks."""
        return self.rank == 0

    def share(self, pieces: Sequence[T]) -> list[T]:
        """This rank's pieces of a batch. Raises RecipeError where they cannot be dealt out evenly."""
        if len(pieces) % self.size:
            raise RecipeError(
                f"batch: {len(pieces)} micro-batches a step cannot be dealt out to {self.size} processes; "
                "make batch.windows / batch.micro a multiple"
            )
        return list(pieces[self.rank :: self.size])

    def every(self, things: Sequence[T]) -> list[T]:
        """This rank's of some things that need not come out even."""
        return list(things[self.rank :: self.size])

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """The sum over all ranks, in place; the same bits everywhere."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all ranks."""
        whole = torch.tensor(value, dtype=torch.float64)
        self.add_up([whole])
        return float(whole)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        return max(self.gather(value))

    def by_leader(self, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What rank 0 gets from some work, told to all; what it raises for the user is raised on all."""
        if self.size == 1:
            return work()
        told: list[T | OctadError | None] = [None]
        if self.leads:
            try:
                told[0] = work()
            except OctadError as error:
                told[0] = error
        dist.broadcast_object_list(told, group=group)
        if isinstance(told[0], OctadError):
            raise told[0]
        return told[0]  # type: ignore[return-value]

    def leader_first(self, work: Callable[[], T]) -> T:
        """Everybody's own work, rank 0's before the others': what it leaves on disk is there for them. Where it fails,
        all fail with its error."""
        if self.size == 1:
            return work()
        done: list[T] = []
        self.by_leader(lambda: done.append(work()))
        return done[0] if done else work()

    def together(self, work: Callable[[], T]) -> T:
        """Everybody's own work, which talks to no other rank; where one fails for the user, all fail with its error."""
        if self.size == 1:
            return work()
        done: list[T] = []
        failed: OctadError | None = None
        try:
            done.append(work())
        except OctadError as error:
            failed = error
        if first := next((error for error in self.gather(failed) if error is not None), None):
            raise first
        return done[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order, on all ranks."""
        if self.size == 1:
            return [value]
        found: list[T] = [value] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turns the errors of an exchange with a process that is gone into one line. Raises LostProcess."""
        try:
            yield
        except RuntimeError as error:
            gone = ("gloo", "NCCL", "Connection closed", "Connection reset")
            if self.size == 1 or not any(word in str(error) for word in gone):
                raise
            words = str(error).split("\n")[0]
            raise LostProcess(
                f"another process of the run was lost ({words[:160]}); the same command goes on from the last state"
            ) from None

    def wait(self) -> None:
        """Until all ranks are here: what rank 0 has written is there for all."""
        if self.size > 1:
            dist.barrier()
