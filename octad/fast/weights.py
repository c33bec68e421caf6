"""Weights that come last: a model is built without memory, laid out over the ranks, and then each fills its own part.

    model = bare_model(config, dtype)             # no memory yet
    ...                                           # modules are swapped, weights laid out over the ranks
    names = materialise(model, device)            # memory for this rank's part of what has none
    fill_from(source)(model, names, pieces)       # read from disk, no more than that part

So no process ever holds more of a model than what it keeps, however many there are. What is small and made before
(low-rank factors) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import nn

from octad.checkpoint.load import empty_model
from octad.checkpoint.source import TensorSource
from octad.checkpoint.spans import Parts, read_rows
from octad.fast.pieces import Piece, local, place_of
from octad.model.config import ModelConfig
from octad.model.transformer import Transformer

Fill = Callable[[Transformer, Collection[str], Mapping[str, Piece]], None]


def bare_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A frozen Transformer on the meta device."""
    return empty_model(config).to(dtype).requires_grad_(False)


def materialise(model: nn.Module, device: torch.device) -> set[str]:
    """Give memory to what is on the meta device, this rank's part of it alone; the names of those parameters."""
    names = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    model._apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]
    return names


def hub_parameter(name: str) -> str:
    """The parameter of a plain model that this one is: a weight with a low-rank change lies a module deeper."""
    return name.replace(".base.weight", ".weight")


def fill_from(source: TensorSource) -> Fill:
    """Reads each part from disk, in the model's own order, which is about that of the disk."""

    @torch.no_grad()
    def fill(model: Transformer, names: Collection[str], pieces: Mapping[str, Piece]) -> None:
        parts = Parts(source.config)
        for name, parameter in model.named_parameters():
            if name in names:
                mine = local(parameter.detach())
                starts, shape = pieces[name].place if name in pieces else place_of(mine)
                for span in parts.spans(hub_parameter(name), starts, shape):
                    span.of(mine).copy_(read_rows(source, span))

    return fill


def fill_drawn(values: Callable[[], Iterable[tuple[str, torch.Tensor]]]) -> Fill:
    """Takes each part out of whole values that are made one after another: every rank makes all of them, as one process
    does, and keeps one at a time."""

    @torch.no_grad()
    def fill(model: Transformer, names: Collection[str], pieces: Mapping[str, Piece]) -> None:
        for name, value in values():
            if name in names:
                mine = local(model.get_parameter(name).detach())
                starts, shape = pieces[name].place if name in pieces else place_of(mine)
                for dim, (start, count) in enumerate(zip(starts, shape, strict=True)):
                    value = value.narrow(dim, start, count)
                mine.copy_(value)

    return fill
