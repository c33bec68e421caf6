"""Weights as the kernels read them, in records: those of a file beside a quantised checkpoint, mapped, or in memory.

    records = RecordWriter(writer, FILE, record_layout(config, schemes), LAYOUT)     # `octad quantize`
    placed = open_records(source)                         # None where there are none to use; a line says why
    placed.weight("model.layers.0.self_attn.q_proj.weight")      # a Packed whose panels lie in the mapped file

record_plan.py says what a record is. The integers and scales of a file are those of the safetensors, which stay the
checkpoint: the file may be deleted. Memory that is laid out alike is filled while PyTorch is imported (beginning.py).
"""

from __future__ import annotations

import logging
from functools import cached_property

import torch

from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.record_file import RecordFile
from octad.checkpoint.record_layout import Part, Record, RecordLayout
from octad.checkpoint.schemes import Schemes
from octad.errors import CheckpointError
from octad.fast.record_plan import expert_record, product_shapes, record_layout, scheme_of
from octad.kernels.arena import mapped
from octad.kernels.packed import Placed
from octad.model.config import ModelConfig

FILE = "packed.octad"
LAYOUT = "panels of 16"  # packed.py's, which all instruction sets read
LOG = logging.getLogger("octad")


class Records:
    """Packed weights where the kernels shall read them."""

    layout: RecordLayout
    config: ModelConfig
    schemes: Schemes
    wide = False  # of 16 bits: as Packed.wide

    @property
    def memory(self) -> torch.Tensor:
        """All records, uint8."""
        raise NotImplementedError

    def weight(self, name: str) -> Placed:
        """A weight of a product, by its tensor's name (a tied head: HEAD)."""
        record, part = self.layout.places[name]
        return self.placed(name, part, self.memory[record.offset : record.offset + record.nbytes])

    def placed(self, name: str, part: Part, record: torch.Tensor) -> Placed:
        """A weight in the memory of its record, uint8."""
        scheme = scheme_of(name, self.schemes)
        outputs, inputs = self._shapes[name]
        panels = torch.as_strided(
            record, (part.panels, part.size), (part.step, 1), record.storage_offset() + part.start
        )
        return Placed(panels, outputs, inputs, scheme.bits, scheme.group, self.wide and scheme.bits == 16)

    def record(self, layer: int, expert: int) -> Record:
        """An expert's."""
        return self.layout.records[expert_record(layer, expert)]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return product_shapes(self.config)


class PlacedWeights(Records):
    """The weights of a checkpoint that has a file of records."""

    def __init__(self, file: RecordFile, source: QuantizedSource) -> None:
        self.file, self.source = file, source
        self.layout, self.config, self.schemes = file.layout, source.config, source.schemes

    @cached_property
    def memory(self) -> torch.Tensor:
        """The whole file, mapped: uint8, and only what is touched takes memory."""
        return mapped(self.file.path, self.file.layout.nbytes)


class FilledRecords(Records):
    """Weights in memory that was filled as the file would be."""

    def __init__(
        self, layout: RecordLayout, config: ModelConfig, schemes: Schemes, memory: torch.Tensor, *, wide: bool
    ) -> None:
        self.layout, self.config, self.schemes, self.wide = layout, config, schemes, wide
        self._memory = memory

    @property
    def memory(self) -> torch.Tensor:
        """What was filled."""
        return self._memory


def open_records(source: QuantizedSource) -> PlacedWeights | None:
    """The source's records; None where it has none, or, with one line, none that can be used."""
    path = source.directory / FILE
    if not path.is_file():
        return None
    try:
        layout = record_layout(source.config, source.schemes)
        return PlacedWeights(RecordFile.open(path, layout, LAYOUT, source.weight_files), source)
    except CheckpointError as error:
        LOG.warning(f"{error}; the weights are packed again, which takes longer and more memory")
        return None
