"""Several processes judging together, each its share of the windows, as torchrun starts them.

    with Ranks.joined() as ranks:               # one process alone where torchrun did not start it
        mine = windows[ranks.rank :: ranks.size]
        whole = ranks.sum(part)                 # the same on every rank

Every process holds the whole model (a GPU of its own where there are some), so all that they exchange is one number a
token, on the CPU, through gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """The processes that torchrun started, together inside the block."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        mine = not dist.is_initialized()
        if mine:
            dist.init_process_group("gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            if mine:
                dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """True on the rank that speaks and writes."""
        return self.rank == 0

    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on each of them."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor)

    def from_first(self, value: Any) -> Any:
        """What rank 0 holds, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
