"""Feed-forward nets and experts rounded for the text that they will see, layer by layer.

    for name, raw, scales in calibrated(source, schemes, windows):     # windows of text, a few thousand tokens
        ...                                                            # every weight of the feed-forward nets once

Text runs through the model as it will be: attention, and the layers before, are rounded already. In each layer every
expert is rounded for the tokens that the router sends it, each by the square of its weight in the sum, which is what its
error counts; first gate and up, then down for what these two now make of the tokens.

One layer is in memory at a time, in float32, and the states of the text. An expert that no token reaches is rounded to
the nearest.

Shapes: N tokens, R of them of one expert, D model, F feed-forward hidden, K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.checkpoint.load import assign, empty_model, state_tensors
from octad.checkpoint.names import EMBEDDING, is_attention, parameter_sources
from octad.checkpoint.schemes import Schemes
from octad.checkpoint.source import TensorSource
from octad.fast.gptq import round_for
from octad.kernels.packed import dequantize
from octad.kernels.packing import quick_quantize
from octad.model.moe import MLP, Experts, MoE
from octad.model.transformer import DecoderLayer
from octad.telling import Share
from octad.text.windows import Window, batches

Rounded = tuple[str, torch.Tensor, torch.Tensor]  # name, unsigned integers [O, K], scales [O, G]
BATCH_TOKENS = 1024


@torch.no_grad()
def calibrated(
    source: TensorSource,
    schemes: Schemes,
    windows: Sequence[Window],
    progress: Share = lambda done: None,
) -> Iterator[Rounded]:
    """Every weight of the feed-forward nets, rounded; `progress` gets the share done."""
    model = empty_model(source.config)
    texts = list(batches(windows, BATCH_TOKENS))
    table = source.read(EMBEDDING)
    states = [table[batch.tokens].float() for batch in texts]
    del table
    layers = model.model.layers
    for number in range(len(layers)):
        prefix = f"model.layers.{number}."
        for parameter, value in state_tensors(source, source.config, prefix, torch.float32).items():
            assign(model, parameter, _as_rounded(value, schemes) if is_attention(parameter) else value)
        layer = cast(DecoderLayer, layers[number])
        states = [layer.attend(state, model.model.rope) for state in states]
        inner = [
            layer.post_attention_layernorm(h)[batch.mask] for h, batch in zip(states, texts, strict=True)
        ]
        step = _Step(schemes, torch.cat(inner))
        yield from step.round(source, prefix, layer.mlp)
        parts = torch.split(step.y_ND, [len(x) for x in inner])
        for h, batch, y in zip(states, texts, parts, strict=True):
            h[batch.mask] += y
        layers[number] = nn.Identity()  # its memory goes
        progress((number + 1) / len(layers))


def _as_rounded(weight: torch.Tensor, schemes: Schemes) -> torch.Tensor:
    """An attention weight as the rounded model has it."""
    scheme = schemes.attention
    return dequantize(*quick_quantize(weight, scheme.bits, scheme.group), scheme.bits)


class _Step:
    """One layer's feed-forward part for the tokens x_ND: its weights rounded, and y_ND, what they then add."""

    def __init__(self, schemes: Schemes, x_ND: torch.Tensor) -> None:
        self.schemes, self.x_ND, self.y_ND = schemes, x_ND, torch.zeros_like(x_ND)

    def round(self, source: TensorSource, prefix: str, mlp: nn.Module) -> Iterator[Rounded]:
        """All nets of the layer."""
        names = parameter_sources(source.config)
        if isinstance(mlp, MLP):
            yield from self._dense(names, f"{prefix}mlp.", mlp, torch.ones(len(self.x_ND), 1))
            return
        assert isinstance(mlp, MoE)
        assert isinstance(mlp.experts, Experts)
        weights_NA, experts_NA = mlp.gate(self.x_ND)
        pairs, downs = (names[f"{prefix}mlp.experts.{part}_proj"] for part in ("gate_up", "down"))
        for e, (gate_up, down) in enumerate(
            zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True)
        ):
            rows, places = (experts_NA == e).nonzero(as_tuple=True)
            net = _Net([*gate_up.chunk(2), down], (pairs[2 * e], pairs[2 * e + 1], downs[e]))
            yield from self._net(net, rows, weights_NA[rows, places, None])
        if mlp.shared_expert is not None:
            share_N1 = mlp.shared_expert_gate(self.x_ND).sigmoid()
            yield from self._dense(names, f"{prefix}mlp.shared_expert.", mlp.shared_expert, share_N1)

    def _dense(
        self, names: dict[str, tuple[str, ...]], prefix: str, mlp: MLP, weight_N1: torch.Tensor
    ) -> Iterator[Rounded]:
        layers = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        found = [names[f"{prefix}{part}_proj.weight"][0] for part in ("gate", "up", "down")]
        net = _Net([layer.weight for layer in layers], found, [layer.bias for layer in layers])
        yield from self._net(net, torch.arange(len(self.x_ND)), weight_N1)

    def _net(self, net: _Net, rows_R: torch.Tensor, weight_R1: torch.Tensor) -> Iterator[Rounded]:
        """One net for some tokens, and their weights in the sum."""
        x_RD = self.x_ND[rows_R]
        yield from net.round((0, 1), x_RD * weight_R1, self.schemes)
        h_RF = F.silu(net.product(0, x_RD)).mul_(net.product(1, x_RD))
        yield from net.round((2,), h_RF * weight_R1, self.schemes)
        self.y_ND.index_add_(0, rows_R, net.product(2, h_RF).mul_(weight_R1))


class _Net:
    """Gate, up and down weights, with their names and biases; each becomes what it is rounded to."""

    def __init__(
        self, weights: list[torch.Tensor], names: Sequence[str], biases: Sequence[torch.Tensor | None] = ()
    ) -> None:
        self.weights, self.names, self.biases = weights, names, biases or (None, None, None)

    def product(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """What a weight makes of x."""
        return F.linear(x, self.weights[part], self.biases[part])

    def round(self, parts: Sequence[int], x_RK: torch.Tensor, schemes: Schemes) -> Iterator[Rounded]:
        """Weights that read the same inputs, for these, each times its weight."""
        scheme, sizes = schemes.ffn, [len(self.weights[part]) for part in parts]
        both = torch.cat([self.weights[part] for part in parts])
        raw, scales = round_for(both, x_RK.T @ x_RK, scheme.bits, scheme.group)
        pieces = zip(parts, torch.split(raw, sizes), torch.split(scales, sizes), strict=True)
        for part, own, its in pieces:
            self.weights[part] = dequantize(own, its, scheme.bits)
            yield self.names[part], own, its
