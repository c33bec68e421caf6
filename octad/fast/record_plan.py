"""Which records a model's packed weights make, and where each weight lies: from the config alone, without PyTorch.

    layout = record_layout(config, schemes)
    layout.places["model.layers.0.self_attn.q_proj.weight"]      # (Record, Part)

One record for each (layer, expert): gate and up with their panels taking turns, as the kernels read them, then down; one
for each feed-forward net of a dense layer; and one for each other weight of a product, the head that a tied model rounds
from its embeddings included.
"""

from __future__ import annotations

from collections.abc import Iterator

from octad.checkpoint.names import EMBEDDING, HEAD, is_linear, layer_of, parameter_sources, tensor_plan
from octad.checkpoint.record_layout import Part, RecordLayout
from octad.checkpoint.schemes import Scheme, Schemes
from octad.kernels.panels import ALIGN, GROUPS, PANEL, panel_bytes
from octad.model.config import ModelConfig

HEAD_SCHEME = Scheme(8, GROUPS[8])  # of a head that is tied to the embeddings


def record_layout(config: ModelConfig, schemes: Schemes) -> RecordLayout:
    """Which records a checkpoint has, in the order in which a token needs them."""
    shapes = product_shapes(config)
    groups = {name: [_alone(name, shapes[name], scheme)] for name, scheme in _single(config, schemes)}
    nets = {name: _net(parts, shapes, schemes) for name, parts in _nets(config)}
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
        yield HEAD, scheme_of(HEAD, schemes)


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


def _net(names: tuple[str, str, str], shapes: dict[str, tuple[int, ...]], schemes: Schemes) -> list[Part]:
    """Gate and up alternately, then down."""
    gate, up, down = names
    one = _alone(gate, shapes[gate], scheme_of(gate, schemes))
    pair = [
        Part(name, one.panels, one.size, start, 2 * one.size) for name, start in ((gate, 0), (up, one.size))
    ]
    behind = -(-2 * one.panels * one.size // ALIGN) * ALIGN
    return [*pair, _alone(down, shapes[down], scheme_of(down, schemes), behind)]
