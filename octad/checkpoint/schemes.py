"""How the weights of each kind of layer are rounded: bits, and how many inputs share a scale. Needs no PyTorch.

schemes.of("model.layers.3.mlp.up_proj.weight")      # Scheme(bits=4, group=32); None for a norm
"""

from __future__ import annotations

from dataclasses import dataclass

from octad.checkpoint.names import HEAD, is_attention, is_linear


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
    """Those of a checkpoint. `head` None: tied to the embeddings, and not on disk."""

    ffn: Scheme  # and experts
    attention: Scheme
    head: Scheme | None

    def of(self, name: str) -> Scheme | None:
        """A tensor's; None for what is not rounded."""
        if name == HEAD:
            return self.head
        return (self.attention if is_attention(name) else self.ffn) if is_linear(name) else None
