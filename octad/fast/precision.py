"""How many bits each kind of weight has. Needs no PyTorch.

Precision.of("int4")           # 4 bits; 8 for attention, head, down projections, and the nets of the first layers

Errors of down projections go into the residual stream as they are, and the first layers make the few values there that
are a hundred times as large as most: so "int4" spares both while a model is loaded. What `octad quantize` writes has
4 bits in all feed-forward nets: it rounds them for text, and other engines have one precision for an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from octad.checkpoint.schemes import Scheme, Schemes
from octad.errors import RequestError
from octad.kernels.panels import GROUPS

SPARED = 8


@dataclass(frozen=True)
class Precision:
    """Bits of the weights in feed-forward nets and experts, in attention, and in the head. `wide`: where these are 16,
    activations are not rounded to bfloat16 (Packed.wide). `spare`: down projections, and the nets in the first tenth of
    the layers, have SPARED bits."""

    ffn: int
    attention: int
    head: int
    wide: bool = False
    spare: bool = False

    @classmethod
    def of(cls, name: str) -> Precision:
        """From the name that a user gives. Raises RequestError."""
        known = {"int8": cls(8, 8, 8), "int4": cls(4, 8, 8, spare=True)}
        if name not in known:
            raise RequestError(f"quantize: found {name!r}, allowed: {', '.join(known)}")
        return known[name]

    def net(self, layer: int, layers: int) -> tuple[int, int]:
        """Bits of gate and up, and of down, in one of so many layers."""
        down = SPARED if self.spare else self.ffn
        return (down if layer < self.first(layers) else self.ffn), down

    def first(self, layers: int) -> int:
        """How many layers are spared whole."""
        return (layers + 5) // 10 if self.spare else 0

    def schemes(self, layers: int) -> Schemes:
        """The same with groups of inputs; a tied head's, too."""
        ffn, attention, head = (Scheme(b, GROUPS[b]) for b in (self.ffn, self.attention, self.head))
        spared = Scheme(SPARED, GROUPS[SPARED]) if self.spare else None
        return Schemes(ffn, attention, head, spared, self.first(layers))

    @property
    def name(self) -> str:
        """What the user calls it, whatever bits attention has: earlier versions saved int4 with 4."""
        return f"int{self.ffn}"
