"""Feed-forward nets and experts rounded to 4 bits without text, by what errors in their inputs cost.

    for name, raw, scales in uncalibrated(source, schemes):
        ...                                                 # every weight of the feed-forward nets once

Layer by layer, as probe.py says; each is forgotten before the next one comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import nn

from octad.checkpoint.load import assign, empty_model, state_tensors
from octad.checkpoint.names import EMBEDDING, is_attention, is_ffn, parameter_sources
from octad.checkpoint.schemes import Scheme, Schemes
from octad.checkpoint.source import TensorSource
from octad.fast.calibrated import Rounded
from octad.fast.held import place_linear
from octad.fast.optimize import native_kernels
from octad.fast.probe import Probe
from octad.kernels.packed import Packed
from octad.kernels.packing import quick_pack
from octad.model.moe import MLP, Experts, MoE
from octad.model.transformer import DecoderLayer, Transformer
from octad.telling import Share


class _Net(NamedTuple):
    """Gate, up and down weights, their names and their biases."""

    weights: list[torch.Tensor]
    names: list[str]
    biases: list[torch.Tensor | None]


@torch.no_grad()
def uncalibrated(
    source: TensorSource, schemes: Schemes, progress: Share = lambda done: None
) -> Iterator[Rounded]:
    """Every weight of the feed-forward nets, rounded; `progress` gets the share done."""
    model = empty_model(source.config)
    assign(model, EMBEDDING, source.read(EMBEDDING))
    probe, layers = Probe(model, native_kernels()), model.model.layers
    for number in range(len(layers)):
        prefix, layer = f"model.layers.{number}.", cast(DecoderLayer, layers[number])
        _place(model, source, prefix, schemes.attention)
        probe.enter(layer)
        for net in _nets(source, prefix, layer.mlp):
            for name, packed in zip(net.names, _rounded(net, probe, schemes.ffn), strict=True):
                raw, scales = packed.raw()
                yield name, raw[: packed.outputs, : packed.inputs].contiguous(), scales[: packed.outputs]
        layers[number] = nn.Identity()  # its memory goes
        progress((number + 1) / len(layers))


def _place(model: Transformer, source: TensorSource, prefix: str, attention: Scheme) -> None:
    """A layer's tensors into the model: attention rounded, feed-forward weights as they are, all else in float32."""
    for parameter, value in state_tensors(source, source.config, prefix).items():
        if is_attention(parameter):
            place_linear(model, parameter, quick_pack(value, attention.bits, attention.group))
        else:
            assign(model, parameter, value if is_ffn(parameter) else value.float())


def _nets(source: TensorSource, prefix: str, mlp: nn.Module) -> Iterator[_Net]:
    """A layer's, experts before a shared one, as a probe takes them."""
    names = parameter_sources(source.config)
    if isinstance(mlp, MLP):
        yield _dense(names, f"{prefix}mlp.", mlp)
        return
    assert isinstance(mlp, MoE)
    assert isinstance(mlp.experts, Experts)
    pairs, downs = (names[f"{prefix}mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
    for e, (gate_up, down) in enumerate(zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)):
        yield _Net([*gate_up.chunk(2), down], [pairs[2 * e], pairs[2 * e + 1], downs[e]], [None] * 3)
    if mlp.shared_expert is not None:
        yield _dense(names, f"{prefix}mlp.shared_expert.", mlp.shared_expert)


def _dense(names: dict[str, tuple[str, ...]], prefix: str, mlp: MLP) -> _Net:
    layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    found = [names[f"{prefix}{part}_proj.weight"][0] for part in ("gate", "up", "down")]
    return _Net([layer.weight for layer in layers], found, [layer.bias for layer in layers])


def _rounded(net: _Net, probe: Probe, scheme: Scheme) -> tuple[Packed, Packed, Packed]:
    gate, up = (quick_pack(w, scheme.bits, scheme.group, cost_K=probe.cost_D) for w in net.weights[:2])
    cost_F = probe.hidden(gate, up, net.biases[:2])
    down = quick_pack(net.weights[2], scheme.bits, scheme.group, cost_K=cost_F)
    probe.through(down, net.biases[2])
    return gate, up, down
