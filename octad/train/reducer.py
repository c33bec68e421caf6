"""Gradients added up over the ranks while the backward pass still goes on.

    reducer = Reducer(optimizer, layout.groups(optimizer.pieces, trainable))
    with reducer.listening():            # around a step's last backward pass
        loss.backward()
    reducer.finish()                     # every gradient is the sum over the ranks now

Parameters are put into buckets, last layers first, as the backward pass comes to them. As soon as all gradients of a
bucket are complete it travels, while earlier layers are still computed. Buckets are fixed from the start and travel
in one order on all ranks, listened to or not, so that overlapping changes no bit. What FSDP has cut it adds up
itself, in its own way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from octad.train.optim import Optimizer

BUCKET = 32 << 20  # bytes of gradients that are added up over the ranks as one


@dataclass
class Bucket:
    """Parameters whose gradients travel as one; `missing`: those that this backward pass has not come to."""

    names: list[str]
    group: dist.ProcessGroup | None
    missing: set[str] = field(default_factory=set)
    gradients: list[torch.Tensor] = field(default_factory=list)
    flat: torch.Tensor | None = None
    work: dist.Work | None = None

    def send(self, gradients: list[torch.Tensor]) -> None:
        """Begin to add them up; small ones are put together first."""
        self.gradients = gradients
        if gradients:
            self.flat = torch.cat([g.flatten() for g in gradients]) if len(gradients) > 1 else gradients[0]
            self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def receive(self) -> None:
        """Wait for the sums, and put them in their places."""
        if self.work is not None and self.flat is not None:
            self.work.wait()
            if len(self.gradients) > 1:
                parts = torch.split(self.flat, [gradient.numel() for gradient in self.gradients])
                for gradient, part in zip(self.gradients, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))
        self.gradients, self.flat, self.work = [], None, None


class Reducer:
    """The buckets of an optimiser's parameters. `groups`: of those whose gradients are added up, by whom (None: by
    all)."""

    def __init__(self, optimizer: Optimizer, groups: Mapping[str, dist.ProcessGroup | None]) -> None:
        self.optimizer = optimizer
        names = [name for name in reversed(optimizer.masters) if name in groups]
        sizes = [4 * optimizer.masters[name].values.numel() for name in names]  # float32
        self.buckets = [
            Bucket([names[n] for n in run], groups[names[run[0]]])
            for run in buckets(sizes, [id(groups[name]) for name in names])
        ]
        self._sent: int = 0
        self._listening = False
        for bucket in self.buckets:
            for name in bucket.names:
                parameter = optimizer.masters[name].parameter
                hook = partial(self._arrived, bucket, name)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    @contextmanager
    def listening(self, overlap: bool = True) -> Iterator[None]:
        """Inside, buckets travel as soon as they are complete: the gradients of earlier passes must have been
        collected."""
        for bucket in self.buckets:
            bucket.missing = set(bucket.names)
        self._listening = overlap
        try:
            yield
        finally:
            self._listening = False

    def finish(self) -> None:
        """Send what was not sent yet, and wait for all of it."""
        while self._sent < len(self.buckets):
            self._send()
        for bucket in self.buckets:
            bucket.receive()
        self._sent = 0

    def _arrived(self, bucket: Bucket, name: str, parameter: torch.Tensor) -> None:
        """Autograd has a parameter's gradient."""
        if not self._listening:
            return
        self.optimizer.collect_of(name)
        bucket.missing.discard(name)
        while self._sent < len(self.buckets) and not self.buckets[self._sent].missing:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[self._sent]
        bucket.send([gradient for name in bucket.names for gradient in self.optimizer.gradients_of(name)])
        self._sent += 1


def buckets(sizes: Sequence[int], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """Numbers of things of one kind each, of about BUCKET bytes together, in the order in which they are full; what is
    larger is alone."""
    open_ones: dict[Hashable, tuple[list[int], int]] = {}
    for number, (own, kind) in enumerate(zip(sizes, kinds, strict=True)):
        run, size = open_ones.get(kind, ([], 0))
        if run and size + own > BUCKET:
            yield run
            run, size = [], 0
        open_ones[kind] = [*run, number], size + own
    yield from (run for run, _ in open_ones.values())
