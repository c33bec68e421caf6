"""Many processes, one run: who this one is, and what all of them say together.

    torchrun --nproc-per-node 2 -m octad train tune.yaml -o tuned/

Every rank draws the same global batch, computes every size-th micro-batch of it, and adds up gradients, loss and expert
loads before the step, so that all ranks take the same step as one process would, within rounding. How weights lie on the
ranks is layout.py's. The state is the global one: a run resumes on any number of ranks. A World of one does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from octad.errors import OctadError, RecipeError

T = TypeVar("T")


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
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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
