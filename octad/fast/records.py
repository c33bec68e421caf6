"""A quantised checkpoint's weights as the kernels read them, beside its safetensors: mapped, not read and repacked.

    records = RecordWriter(writer, FILE, record_layout(config, schemes), LAYOUT)     # `octad quantize`
    placed = open_records(source)                         # None where there are none to use; a line says why
    placed.weight("model.layers.0.self_attn.q_proj.weight")      # a Packed whose panels lie in the mapped file

One record for each (layer, expert): gate and up with their panels taking turns, as the kernels read them, then down; one
for each feed-forward net of a dense layer; and one for each other weight of a product, the head that a tied model rounds
from its embeddings included. The integers and scales are those of the safetensors, which stay the checkpoint: this file
may be deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from octad.checkpoint.names import EMBEDDING, HEAD, is_linear, layer_of, parameter_sources, tensor_plan
from octad.checkpoint.quantized import QuantizedSource, Scheme, Schemes
from octad.checkpoint.record_file import Part, Record, RecordFile, RecordLayout
from octad.errors import CheckpointError
from octad.kernels.arena import ALIGN, mapped
from octad.kernels.packed import GROUPS, PANEL, Placed, panel_bytes
from octad.model.config import ModelConfig

FILE = "packed.octad"
LAYOUT = "panels of 16"  # packed.py's, which all instruction sets read
LOG = logging.getLogger("octad")
HEAD_SCHEME = Scheme(8, GROUPS[8])  # of a head that is tied to the embeddings


def record_layout(config: ModelConfig, schemes: Schemes) -> RecordLayout:
    """Which records a checkpoint has, in the order in which a token needs them."""
    shapes = product_shapes(config)
    groups = {name: [_alone(name, shapes[name], scheme)] for name, scheme in _single(config, schemes)}
    nets = {name: _net(parts, shapes, schemes.ffn) for name, parts in _nets(config)}
    ordered = sorted((groups | nets).items(), key=lambda item: _place(item[0], config.num_hidden_layers))
    return RecordLayout(dict(ordered))


def product_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """tensor_plan, with the head that a tied model rounds from its embeddings."""
    shapes = tensor_plan(config)
    return {HEAD: shapes[EMBEDDING]} | shapes


def expert_record(layer: int, expert: int) -> str:
    """The name of an expert's record."""
    return f"model.layers.{layer}.mlp.experts.{expert}"


def scheme_of(name: str, schemes: Schemes) -> Scheme:
    """How a weight of a product is rounded in the records."""
    return schemes.of(name) or HEAD_SCHEME


def _place(name: str, layers: int) -> int:
    layer = layer_of(name)
    return layers if layer is None else layer


def _single(config: ModelConfig, schemes: Schemes) -> Iterator[tuple[str, Scheme]]:
    """Weights with a record of their own."""
    together = {part for _, parts in _nets(config) for part in parts}
    for names in parameter_sources(config).values():
        for name in names:
            if (is_linear(name) or name == HEAD) and name not in together:
                yield name, scheme_of(name, schemes)
    if config.tie_word_embeddings:
        yield HEAD, HEAD_SCHEME


def _nets(config: ModelConfig) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """The feed-forward nets that one call runs: the name of the record; gate, up and down."""
    sources = parameter_sources(config)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp"
        if stacked := sources.get(f"{at}.experts.gate_up_proj"):
            downs = sources[f"{at}.experts.down_proj"]
            for expert, down in enumerate(downs):
                yield expert_record(layer, expert), (stacked[2 * expert], stacked[2 * expert + 1], down)
        for net in (at, f"{at}.shared_expert"):
            if f"{net}.gate_proj.weight" in sources and f"{net}.gate_proj.bias" not in sources:
                gate, up, down = (sources[f"{net}.{part}_proj.weight"][0] for part in ("gate", "up", "down"))
                yield net, (gate, up, down)


def _alone(name: str, shape: tuple[int, ...], scheme: Scheme, start: int = 0) -> Part:
    size = panel_bytes(scheme.bits, scheme.group, shape[1])
    return Part(name, -(-shape[0] // PANEL), size, start, size)


def _net(names: tuple[str, str, str], shapes: dict[str, tuple[int, ...]], scheme: Scheme) -> list[Part]:
    """Gate and up alternately, then down."""
    gate, up, down = names
    one = _alone(gate, shapes[gate], scheme)
    pair = [
        Part(name, one.panels, one.size, start, 2 * one.size) for name, start in ((gate, 0), (up, one.size))
    ]
    behind = -(-2 * one.panels * one.size // ALIGN) * ALIGN
    return [*pair, _alone(down, shapes[down], scheme, behind)]


@dataclass(frozen=True)
class PlacedWeights:
    """The weights of a checkpoint that has a file of records."""

    file: RecordFile
    source: QuantizedSource

    @cached_property
    def memory(self) -> torch.Tensor:
        """The whole file, mapped: uint8, and only what is touched takes memory."""
        return mapped(self.file.path, self.file.layout.nbytes)

    def weight(self, name: str) -> Placed:
        """A weight of a product, by its tensor's name (a tied head: HEAD)."""
        record, part = self.file.layout.places[name]
        return self.placed(name, part, self.memory[record.offset : record.offset + record.nbytes])

    def placed(self, name: str, part: Part, record: torch.Tensor) -> Placed:
        """A weight in the memory of its record, uint8."""
        scheme = scheme_of(name, self.source.schemes)
        outputs, inputs = self._shapes[name]
        panels = torch.as_strided(
            record, (part.panels, part.size), (part.step, 1), record.storage_offset() + part.start
        )
        return Placed(panels, outputs, inputs, scheme.bits, scheme.group)

    def record(self, layer: int, expert: int) -> Record:
        """An expert's."""
        return self.file.layout.records[expert_record(layer, expert)]

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return product_shapes(self.source.config)


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
