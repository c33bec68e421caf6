"""Where weights lie among records: one run of bytes for what is needed together, each at a multiple of ALIGN.

    layout = RecordLayout({"layers.0.experts.3": [Part("...w1.weight", 96, 9536, 0, 19072), ...]})
    record, part = layout.places["...w1.weight"]        # the first panel: at record.offset + part.start

The plan of a file of records (record_file.py), or of memory that is filled as if it were one. Needs no PyTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

ALIGN, HEADER = 4096, 1 << 16  # the header has its own, fixed room


@dataclass(frozen=True)
class Part:
    """A weight's panels inside a record: `panels` of `size` bytes, the first at `start`, each `step` behind the last."""

    name: str
    panels: int
    size: int
    start: int
    step: int

    @property
    def end(self) -> int:
        """The byte behind the last panel."""
        return self.start + (self.panels - 1) * self.step + self.size


@dataclass(frozen=True)
class Record:
    """One run of bytes of the file, and the weights in it."""

    offset: int
    nbytes: int
    parts: tuple[Part, ...]


class RecordLayout:
    """Where every record of a file lies: one behind the other, each at a multiple of ALIGN."""

    def __init__(self, parts: Mapping[str, Sequence[Part]]) -> None:
        self.records: dict[str, Record] = {}
        self.places: dict[str, tuple[Record, Part]] = {}
        end = HEADER
        for name, own in parts.items():
            nbytes = -(-max(part.end for part in own) // ALIGN) * ALIGN
            record = self.records[name] = Record(end, nbytes, tuple(own))
            self.places.update({part.name: (record, part) for part in own})
            end += nbytes
        self.nbytes = end

    @cached_property
    def digest(self) -> str:
        """Of everything: two layouts that say the same have the same."""
        return hashlib.sha256(repr(sorted(self.records.items())).encode()).hexdigest()
