"""The key tables: how the public checkpoints of each family name their tensors, and what a config promises to
hold.

    parameter_sources(config)["model.layers.0.mlp.experts.down_proj"]   # (the 8 experts' w2, in order)
    tensor_plan(config)["model.layers.0.self_attn.q_proj.weight"]       # (4096, 4096)

Dense parts have one name in every family. Experts and routers differ: Mixtral says `block_sparse_moe` and w1
(gate), w3 (up), w2 (down); Qwen2-MoE, Qwen3-MoE and OLMoE say `mlp` and gate_proj, up_proj, down_proj. In
memory every mixture has the names of `octad.model`: `mlp.gate.weight`, `mlp.experts.gate_up_proj`,
`mlp.experts.down_proj`. One table, walked layer by layer, gives both directions.

Shapes: D model, F feed-forward hidden, E experts, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from octad.model.config import ModelConfig
from octad.model.families import FAMILIES, Part

PARTS: tuple[Part, ...] = ("gate", "up", "down")
DOWN = tuple({".down_proj.weight"} | {f".{f.expert_parts[2]}.weight" for f in FAMILIES.values()})
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_FFN = re.compile(r"\.(?:mlp|block_sparse_moe)\.(?!gate\.|shared_expert_gate\.)")


class Row(NamedTuple):
    """One parameter of the Transformer and the (hub name, shape) of each tensor it is built from, in order."""

    parameter: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


def layer_of(name: str) -> int | None:
    """The layer that a tensor or parameter belongs to; None for embeddings, last norm and head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def is_ffn(name: str) -> bool:
    """True for weights and biases of a feed-forward net: dense, expert or shared expert; routers and gates are not."""
    return _FFN.search(name) is not None


def part_of(name: str) -> str:
    """The part of a model that a tensor belongs to: 'embeddings', 'head', 'norms', 'attention', 'ffn', 'router' or
    'shared expert'."""
    if name in (EMBEDDING, HEAD):
        return "head" if name == HEAD else "embeddings"
    if "norm" in name:
        return "norms"
    if ".self_attn." in name:
        return "attention"
    if ".shared_expert" in name:
        return "shared expert"
    return "ffn" if is_ffn(name) else "router"


def is_linear(name: str) -> bool:
    """True for the weights [O, K] that most of a model's bytes are: attention's projections and feed-forward nets."""
    return is_attention(name) or (is_ffn(name) and name.endswith(".weight"))


def is_attention(name: str) -> bool:
    """True for the weights of attention's projections."""
    return ".self_attn." in name and name.endswith("_proj.weight")


def is_down(name: str) -> bool:
    """True for the weights of down projections, the second half of a feed-forward net."""
    return is_ffn(name) and name.endswith(DOWN)


def dense_mlp_name(layer: int, part: Part) -> str:
    """The weight of one projection of a dense feed-forward network, the same in every family."""
    return f"model.layers.{layer}.mlp.{part}_proj.weight"


def expert_name(family: str, layer: int, expert: int, part: Part) -> str:
    """The weight of one projection of one expert, as the family's checkpoints call it."""
    return FAMILIES[family].expert_name(layer, expert, part)


def router_name(family: str, layer: int) -> str:
    """The router's weight [E, D], as the family's checkpoints call it."""
    return FAMILIES[family].router_name(layer)


def parameter_sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For each parameter of Transformer(config), the hub tensors it is built from: one, or for stacked experts
    gate_0, up_0, gate_1, up_1, ... and down_0, down_1, ..., whose rows in that order are its rows."""
    return {row.parameter: tuple(name for name, _ in row.tensors) for row in _rows(config)}


def tensor_plan(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hub name to shape of everything that a checkpoint of this config holds (a tied head is no tensor of its own)."""
    return {name: shape for row in _rows(config) for name, shape in row.tensors}


def _rows(config: ModelConfig) -> Iterator[Row]:
    D, V = config.hidden_size, config.vocab_size
    yield _same(EMBEDDING, V, D)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        yield _same(f"{at}.input_layernorm.weight", D)
        yield from _attention_rows(config, f"{at}.self_attn")
        yield _same(f"{at}.post_attention_layernorm.weight", D)
        if config.is_moe_layer(layer):
            yield from _moe_rows(config, layer)
        else:
            yield from _mlp_rows(f"{at}.mlp", D, config.intermediate_size, bias=config.mlp_bias)
    yield _same(FINAL_NORM, D)
    if not config.tie_word_embeddings:
        yield _same(HEAD, V, D)


def _same(name: str, *shape: int) -> Row:
    return Row(name, ((name, shape),))


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Row]:
    yield _same(f"{name}.weight", rows, columns)
    if bias:
        yield _same(f"{name}.bias", rows)


def _attention_rows(config: ModelConfig, at: str) -> Iterator[Row]:
    D, K = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * K, config.num_key_value_heads * K
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        yield from _linear(f"{at}.{letter}_proj", rows, D, bias=config.qkv_bias)
    yield from _linear(f"{at}.o_proj", D, q, bias=config.o_bias)
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        yield _same(f"{at}.q_norm.weight", K if per_head else q)
        yield _same(f"{at}.k_norm.weight", K if per_head else kv)


def _mlp_rows(at: str, D: int, F: int, *, bias: bool = False) -> Iterator[Row]:
    yield from _linear(f"{at}.gate_proj", F, D, bias=bias)
    yield from _linear(f"{at}.up_proj", F, D, bias=bias)
    yield from _linear(f"{at}.down_proj", D, F, bias=bias)


def _moe_rows(config: ModelConfig, layer: int) -> Iterator[Row]:
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    at, shapes = f"model.layers.{layer}.mlp", {"gate": (F, D), "up": (F, D), "down": (D, F)}

    def stacked(*parts: Part) -> tuple[tuple[str, tuple[int, ...]], ...]:
        names = ((expert_name(config.model_type, layer, e, p), shapes[p]) for e in range(E) for p in parts)
        return tuple(names)

    yield Row(f"{at}.gate.weight", ((router_name(config.model_type, layer), (E, D)),))
    yield Row(f"{at}.experts.gate_up_proj", stacked("gate", "up"))
    yield Row(f"{at}.experts.down_proj", stacked("down"))
    if shared := config.shared_expert_intermediate_size:
        yield from _mlp_rows(f"{at}.shared_expert", D, shared)
        yield _same(f"{at}.shared_expert_gate.weight", 1, D)
