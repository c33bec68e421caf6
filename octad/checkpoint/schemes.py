"""How the weights of each kind of layer are rounded: bits, and how many inputs share a scale. Needs no PyTorch.

schemes.of("model.layers.3.mlp.up_proj.weight")      # Scheme(bits=4, group=32); None for a norm
"""

from __future__ import annotations

from dataclasses import dataclass

from octad.checkpoint.names import HEAD, is_attention, is_down, is_linear, layer_of


@dataclass(frozen=True)
class Scheme:
    """How the weights of one kind of layer are rounded."""

    bits: int
    group: int

    @property
    def bytes(self) -> float:
        """Of one weight, with its part of a scale."""
        return self.bits / 8 + 2 / self.group


@dataclass(frozen=True)
class Schemes:
    """Those of a model. `head` None: tied to the embeddings, and not on disk. `spared`: of the nets in the first `first`
    layers, and of all down projections, where they have one of their own."""

    ffn: Scheme  # and experts
    attention: Scheme
    head: Scheme | None
    spared: Scheme | None = None
    first: int = 0

    def net_bytes(self, layers: int) -> float:
        """Of a mean weight of the feed-forward nets of a model of so many layers."""
        if self.spared is None:
            return self.ffn.bytes
        spared = (self.first + (layers - self.first) / 3) / layers
        return self.ffn.bytes + spared * (self.spared.bytes - self.ffn.bytes)

    def of(self, name: str) -> Scheme | None:
        """A tensor's; None for what is not rounded."""
        if name == HEAD:
            return self.head
        if not is_linear(name):
            return None
        if is_attention(name):
            return self.attention
        early = (layer_of(name) or 0) < self.first
        return self.spared if self.spared is not None and (early or is_down(name)) else self.ffn
