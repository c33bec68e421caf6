"""Which inputs of feed-forward nets matter, found without a user's text: for rounding these nets to 4 bits.

    probe = Probe(model, kernels)                  # ids drawn from the vocabulary, as embeddings
    probe.enter(layer)                             # attention is packed, all else as it was: probe.cost_D, of gate and up
    cost_F = probe.hidden(gate, up)                # of the down projection behind these two; net after net
    probe.through(down)                            # the same nets in the same order

What an error in an input's weights costs is its square times the input's mean square; for down projections beside the
square of the state that they add to, since the next norm divides by that. A few inputs are a hundred times as
large as most; which ones only a pass through the model shows, and what it reads hardly matters. So random ids go through
it layer by layer, while it is rounded: attention, and the layers before, are as they will be. Every expert is shown all
of them, so that one that routers would not ask has its costs too.

The ids depend on the vocabulary's size alone, and all arithmetic is the kernels', in float32, whatever the model runs on:
it is rounded to the same integers whenever it is saved.

Shapes: S ids, R of them of one net, D model, F feed-forward hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.native_modules import NativeAttention, as_it_is
from octad.kernels.native import NativeKernels, describe
from octad.kernels.packed import Packed, linear
from octad.model.moe import MoE
from octad.model.transformer import DecoderLayer, Transformer

IDS = 128
TINY = 1e-30
# the rows [R] that a net works on, and its weight in each one's sum [R, 1]
Share = tuple[torch.Tensor, torch.Tensor]


class Probe:
    """Random ids on their way through a model that is being rounded."""

    def __init__(self, model: Transformer, kernels: NativeKernels | None) -> None:
        """`model` has its embeddings; its layers come one after the other. Without `kernels` PyTorch multiplies."""
        self.kernels, self.rope = kernels, model.model.rope
        embed = model.model.embed_tokens
        # by NumPy: a PyTorch that was begun quickly (cli/quick_start.py) has no generators yet
        drawn = np.random.RandomState(0).randint(0, 1 << 32, (1, IDS), dtype=np.uint32)
        ids = torch.from_numpy(drawn.astype(np.int64) % model.config.vocab_size)
        self._state_1SD = embed(ids.to(embed.weight.device)).detach().float()

    @torch.no_grad()
    def enter(self, layer: DecoderLayer) -> None:
        """Through the first half of a layer whose attention has PackedLinear, and to its nets."""
        attention: nn.Module = layer.self_attn
        with _in_float32(layer.input_layernorm, attention, layer.post_attention_layernorm):
            if self.kernels is not None:
                attention = NativeAttention(self.kernels, layer.self_attn, as_it_is)
            self._state_1SD = self._state_1SD + attention(layer.input_layernorm(self._state_1SD), self.rope)
            self._x_SD: torch.Tensor = layer.post_attention_layernorm(self._state_1SD)[0].contiguous()
        self.cost_D = _mean_square(self._x_SD)
        self._size_S1 = self._state_1SD[0].square().mean(1, keepdim=True).clamp_min(TINY).sqrt()
        self._shares, self._hidden = deque(self._shares_of(layer.mlp)), deque[torch.Tensor]()

    def _shares_of(self, mlp: nn.Module) -> Iterator[Share]:
        """Of each net: experts one after the other, then a shared one."""
        rows = torch.arange(len(self._x_SD), device=self._x_SD.device)
        if not isinstance(mlp, MoE):
            yield rows, torch.ones_like(rows, dtype=torch.float32)[:, None]
            return
        weights_SA, experts_SA = mlp.gate(self._x_SD)
        for e in range(len(mlp.experts.gate_up_proj)):  # type: ignore[arg-type]
            own, places = (experts_SA == e).nonzero(as_tuple=True)
            yield own, weights_SA[own, places, None]
        if mlp.shared_expert is not None:
            yield rows, F.linear(self._x_SD, mlp.shared_expert_gate.weight.float()).sigmoid()

    @torch.no_grad()
    def hidden(
        self, gate: Packed, up: Packed, biases: Sequence[torch.Tensor | None] = (None, None)
    ) -> torch.Tensor:
        """The costs [F] of what the next net's down projection reads, from its rounded gate and up."""
        gate_SF, up_SF = (self._product(self._x_SD, w, b) for w, b in zip((gate, up), biases, strict=True))
        self._hidden.append(F.silu(gate_SF).mul_(up_SF))
        return _mean_square(self._hidden[-1] / self._size_S1)

    @torch.no_grad()
    def through(self, down: Packed, bias: torch.Tensor | None = None) -> None:
        """Add what the next net, now whole, makes of its rows."""
        (rows, weight_R1), h_SF = self._shares.popleft(), self._hidden.popleft()
        y_RD = self._product(h_SF[rows], down, bias).mul_(weight_R1)
        self._state_1SD[0].index_add_(0, rows, y_RD)

    def _product(self, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        if self.kernels is None:
            y = linear(x, weight)
        else:
            (y,) = self.kernels.linear(describe([weight]), x)
        return y if bias is None else y + bias.float()


def _mean_square(x_SK: torch.Tensor) -> torch.Tensor:
    """Of each input, [K]."""
    return x_SK.square().mean(0)


@contextmanager
def _in_float32(*modules: nn.Module) -> Iterator[None]:
    """Inside, these have parameters in float32; behind it they are what they were."""
    dtypes = [{p.dtype for p in module.parameters()} for module in modules]
    for module in modules:
        module.float()
    yield
    for module, own in zip(modules, dtypes, strict=True):
        for dtype in own - {torch.float32}:
            module.to(dtype)
