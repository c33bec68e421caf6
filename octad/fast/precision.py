"""How many bits each kind of weight has. Needs no PyTorch.

Precision.of("int4")           # 4 bits, but 8 for attention and head
"""

from __future__ import annotations

from dataclasses import dataclass

from octad.errors import RequestError


@dataclass(frozen=True)
class Precision:
    """Bits of the weights in feed-forward nets and experts, in attention, and in the head. `wide`: where these are 16,
    activations are not rounded to bfloat16 (Packed.wide)."""

    ffn: int
    attention: int
    head: int
    wide: bool = False

    @classmethod
    def of(cls, name: str) -> Precision:
        """From the name that a user gives. Raises RequestError."""
        known = {"int8": cls(8, 8, 8), "int4": cls(4, 8, 8)}
        if name not in known:
            raise RequestError(f"quantize: found {name!r}, allowed: {', '.join(known)}")
        return known[name]

    @property
    def name(self) -> str:
        """What the user calls it, whatever bits attention has: earlier versions saved int4 with 4."""
        return f"int{self.ffn}"
