"""The key tables against what transformers saves, and against the parameters of our own Transformer."""

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, MOE, TinyCheckpoint

from octad.checkpoint import names
from octad.checkpoint.hf import read_config
from octad.model import cost
from octad.model.transformer import Transformer

VARIANTS = [
    *[(family, {}) for family in FAMILIES],
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
]


def on_disk(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_plan_is_what_transformers_saves(family: str, changes: dict, tiny_checkpoint: TinyCheckpoint) -> None:
    directory = tiny_checkpoint(family, **changes)
    config = read_config(directory)
    plan = names.tensor_plan(config)
    assert plan == on_disk(directory)
    assert sum(map(math.prod, plan.values())) == cost.parameters(config)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_sources_cover_the_model(family: str, changes: dict, tiny_checkpoint: TinyCheckpoint) -> None:
    config = read_config(tiny_checkpoint(family, **changes))
    with torch.device("meta"):
        parameters = {name: p.shape for name, p in Transformer(config).named_parameters()}
    sources, plan = names.parameter_sources(config), names.tensor_plan(config)
    assert sources.keys() == parameters.keys()
    assert sorted(name for group in sources.values() for name in group) == sorted(plan)
    for name, shape in parameters.items():
        assert sum(math.prod(plan[part]) for part in sources[name]) == shape.numel()


def test_order_of_stacked_experts(tiny_checkpoint: TinyCheckpoint) -> None:
    config = read_config(tiny_checkpoint("mixtral"))
    sources = names.parameter_sources(config)
    at = "model.layers.1.block_sparse_moe.experts"
    assert sources["model.layers.1.mlp.experts.gate_up_proj"][:3] == (
        f"{at}.0.w1.weight",
        f"{at}.0.w3.weight",
        f"{at}.1.w1.weight",
    )
    assert sources["model.layers.1.mlp.experts.down_proj"] == tuple(f"{at}.{e}.w2.weight" for e in range(3))


@pytest.mark.parametrize("family", MOE)
def test_expert_and_router_names(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    disk = on_disk(tiny_checkpoint(family))
    assert disk[names.router_name(family, 1)] == (3, 32)
    for part in names.PARTS:
        assert names.expert_name(family, 1, 2, part) in disk


def test_dense_families_have_no_experts() -> None:
    with pytest.raises(ValueError, match="llama"):
        names.expert_name("llama", 0, 0, "up")


def test_layer_and_ffn() -> None:
    assert names.layer_of("model.layers.13.self_attn.q_proj.bias") == 13
    assert names.layer_of("lm_head.weight") is None
    assert names.dense_mlp_name(3, "up") == "model.layers.3.mlp.up_proj.weight"
    yes = ["mlp.up_proj.weight", "mlp.down_proj.bias", "block_sparse_moe.experts.1.w1.weight"]
    yes += ["mlp.experts.0.up_proj.weight", "mlp.experts.gate_up_proj", "mlp.shared_expert.gate_proj.weight"]
    yes += ["mlp.gate_proj.weight"]
    no = ["self_attn.q_proj.weight", "post_attention_layernorm.weight", "mlp.gate.weight"]
    no += ["block_sparse_moe.gate.weight", "mlp.shared_expert_gate.weight"]
    assert all(names.is_ffn(f"model.layers.0.{name}") for name in yes)
    assert not any(names.is_ffn(f"model.layers.0.{name}") for name in no)
    assert not names.is_ffn(names.EMBEDDING)
