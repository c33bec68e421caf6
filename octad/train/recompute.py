"""Activation checkpointing: a block keeps its input alone, and is computed again when its gradient is due.

    checkpoint_activations(model)                 # in place, once the blocks are what they are going to be

What the router decided is kept too, a few numbers a token: who was chosen, their order and what is drawn at random.
Computing the choice again would cost sorting, and another choice, where two experts are all but equal, would take the
gradient of what was not computed.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
ROUTING = [
    _aten.topk.default,
    _aten.multinomial.default,
    _aten.sort.stable,
    _aten.argsort.default,
    _aten.searchsorted.Tensor,
    _aten.bincount.default,
]


def checkpoint_activations(model: nn.Module) -> None:
    """Keep each block's input and its routing only."""
    contexts = functools.partial(create_selective_checkpoint_contexts, ROUTING)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
