"""What the routers of a model answer, kept: one entry a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from octad.model.observe import watching
from octad.model.transformer import Transformer

Routing = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def recording(model: Transformer) -> Iterator[list[Routing | None]]:
    """Inside, the last (weights_NA, experts_NA) of each layer; None where there is no router."""
    record: list[Routing | None] = [None] * len(model.model.layers)

    def keep(
        number: int, gate: Any, x_ND: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> None:
        record[number] = weights, experts

    with watching(model, keep):
        yield record
