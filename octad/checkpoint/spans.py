"""Parts of a model's parameters: which rows of which tensors on disk they are, to read or to write no more than those.

    for span in Parts(config).spans("model.layers.0.mlp.experts.gate_up_proj", (2, 0, 0), (2, 512, 4096)):
        span.of(mine).copy_(read_rows(source, span))

A process of many holds a part of each parameter: rows of a matrix, some experts of a stack, or rows of every expert. On
disk an expert's gate, up and down are tensors of their own, so that a part is made of runs of rows, each contiguous in
its file.

Shapes: E experts; a stacked parameter [E, rows, columns] has an expert's gate first, then its up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from octad.checkpoint.names import parameter_sources, tensor_plan
from octad.checkpoint.source import TensorSource
from octad.model.config import ModelConfig


@dataclass(frozen=True)
class Span:
    """`count` rows of the tensor `name` from row `first` on; in a part they are rows from `place` on, of expert `expert`
    where the part is one of a stack."""

    name: str
    first: int
    count: int
    place: int
    expert: int | None = None

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """These rows in a part, sharing memory."""
        rows = part if self.expert is None else part[self.expert]
        return rows[self.place : self.place + self.count]


class Parts:
    """The spans of one model's parameters."""

    def __init__(self, config: ModelConfig) -> None:
        self.sources, self.shapes = parameter_sources(config), tensor_plan(config)
        self.experts = config.num_experts if config.is_moe else 0

    def spans(self, parameter: str, starts: Sequence[int], shape: Sequence[int]) -> Iterator[Span]:
        """The part of a parameter that begins at `starts` in each dimension and has this shape; whole in the last one of
        matrices and stacks."""
        names = self.sources[parameter]
        if len(shape) < 3:
            if shape[0]:
                yield Span(names[0], starts[0], shape[0], 0)
            return
        each = len(names) // self.experts
        for expert in range(shape[0]):
            passed = 0
            for name in names[(starts[0] + expert) * each :][:each]:
                height = self.shapes[name][0]
                begin, end = max(starts[1], passed), min(starts[1] + shape[1], passed + height)
                if begin < end:
                    yield Span(name, begin - passed, end - begin, begin - starts[1], expert)
                passed += height


def read_rows(source: TensorSource, span: Span) -> torch.Tensor:
    """Some rows of a tensor: no more than their bytes where they lie on disk as they are read (or where the source
    knows a way of its own to rows), else all of it."""
    own: Callable[[Span], torch.Tensor] | None = getattr(source, "read_rows", None)
    if own is not None:
        return own(span)
    extent = source.extent(span.name)
    if extent is None:
        return source.read(span.name)[span.first : span.first + span.count]
    columns = math.prod(extent.info.shape[1:])
    return extent.part(span.first * columns, (span.count, *extent.info.shape[1:])).read()
