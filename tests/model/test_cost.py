"""Parameters, FLOPs and bytes by config: as published, as torch counts, on the meta device, and by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, TinyCheckpoint
from torch.utils.flop_counter import FlopCounterMode

from octad.checkpoint.load import load_model, open_source
from octad.model import cost
from octad.model.cache import ContiguousCache
from octad.model.config import ModelConfig
from octad.model.transformer import Transformer


def shape(
    family: str, layers: int, d: int, ff: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> ModelConfig:
    """The config of a published model, by the numbers in its config.json."""
    raw: dict[str, Any] = {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": d,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }
    return ModelConfig.from_dict(raw | more)


def qwen3_moe(layers: int, d: int, ff: int, heads: int) -> ModelConfig:
    more = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": ff, "head_dim": 128}
    return shape("qwen3_moe", layers, d, 3 * d, heads, 4, 151936, **more)


# billions, in all and active a token, as the models' own cards and reports say them
PUBLISHED = {
    "Mixtral 8x7B": (shape("mixtral", 32, 4096, 14336, 32, 8, 32000), 46.703, 12.880),
    "Mixtral 8x22B": (shape("mixtral", 56, 6144, 16384, 48, 8, 32768), 140.630, 39.161),
    "Qwen3-30B-A3B": (qwen3_moe(48, 2048, 768, 32), 30.532, 3.353),
    "Qwen3-235B-A22B": (qwen3_moe(94, 4096, 1536, 64), 235.094, 22.191),
    "OLMoE-1B-7B": (shape("olmoe", 16, 2048, 1024, 16, 16, 50304), 6.919, 1.282),
    "Llama 3.1 405B": (shape("llama", 126, 16384, 53248, 128, 8, 128256), 405.853, 405.853),
    "Llama 3.1 70B": (shape("llama", 80, 8192, 28672, 64, 8, 128256), 70.554, 70.554),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    config, total, active = PUBLISHED[name]
    assert cost.parameters(config) / 1e9 == pytest.approx(total, abs=5e-4)
    assert cost.parameters(config, active=True) / 1e9 == pytest.approx(active, abs=5e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_on_the_meta_device(name: str) -> None:
    config = PUBLISHED[name][0]
    with torch.device("meta"):
        model = Transformer(config)
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert cost.routed_parameters(config) == experts


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    config = open_source(tiny_checkpoint(family)).config
    layers = sum(cost.layer_parameters(config, i, active=True) for i in range(config.num_hidden_layers))
    assert cost.body_parameters(config) == layers + config.hidden_size
    tables = cost.parameters(config, active=True) - cost.body_parameters(config)
    assert tables == (1 if config.tie_word_embeddings else 2) * 96 * 32


def test_active_parameters_by_hand() -> None:
    config = shape("mixtral", 3, 64, 96, 4, 2, 128, num_local_experts=8)
    expert = 3 * 64 * 96
    per_layer = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 8 * 64
    shared = 2 * 128 * 64 + 64 + 3 * per_layer
    assert cost.parameters(config) == shared + 3 * 8 * expert
    assert cost.parameters(config, active=True) == shared + 3 * 2 * expert
    assert cost.kv_bytes_per_token(config) == 2 * 3 * 2 * 16 * 2


def test_training_flops_are_torchs_own_count(tiny_checkpoint: TinyCheckpoint) -> None:
    """Forward and backward of one window, all matrices learning: attention by hand, the rest as torch counts it."""
    model, S = load_model(open_source(tiny_checkpoint("llama")), torch.float32), 8
    config = model.config
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(S)[None]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counted.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    learning = {n: p.numel() for n, p in model.named_parameters() if p.dim() >= 2}
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    scores = 2 * 4 * config.num_attention_heads * config.head_dim * (S // 2) * config.num_hidden_layers
    assert cost.training_flops(config, learning, S) * S == matrices + S * (scores + 4 * vectors)


def test_frozen_weights_and_idle_experts_cost_no_gradient() -> None:
    config = shape("mixtral", 3, 64, 96, 4, 2, 128, num_local_experts=8)
    forward = cost.flops_per_token(config, 16)
    assert cost.training_flops(config, {}, 32) == 2 * forward
    assert (
        cost.training_flops(config, {"model.layers.0.mlp.experts.down_proj": 800}, 32)
        == 2 * forward + 2 * 200
    )
    assert cost.training_flops(config, {"model.embed_tokens.weight": 800}, 32) == 2 * forward


def test_expected_experts_by_counting_all_choices() -> None:
    config = shape("mixtral", 1, 64, 96, 4, 2, 128, num_local_experts=4, num_experts_per_tok=1)
    pairs = [len({a, b, c}) for a in range(4) for b in range(4) for c in range(4)]
    assert cost.expected_experts(config, 3) == pytest.approx(sum(pairs) / len(pairs))
    assert cost.expected_experts(replace(config, num_experts_per_tok=2), 1) == pytest.approx(2)


def test_per_parameter_weighs_attention_by_its_share() -> None:
    config = PUBLISHED["Mixtral 8x7B"][0]
    attention = 32 * cost.attention_parameters(config)
    bits = 4 * (cost.parameters(config) - attention) + 8 * attention
    assert cost.per_parameter(config, 4, 8) * cost.parameters(config) == pytest.approx(bits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_prefill_flops_are_torchs_own_count(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    model, S = load_model(open_source(tiny_checkpoint(family)), torch.float32), 7
    config = model.config
    cache = ContiguousCache(config, 1, S)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head(model.model(torch.arange(S)[None], cache)[:, -1])
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in counted.items() if "attention" not in str(op))
    vectors = sum(
        p.numel() for p in model.parameters() if p.dim() == 1
    )  # norms, biases: two a value and token
    scores = (
        4 * config.num_attention_heads * config.head_dim * sum(range(1, S + 1)) * config.num_hidden_layers
    )
    assert cost.prefill_flops(config, S) == matrices + 2 * vectors * S + scores


def test_prefill_flops_of_a_mixture_by_hand(tiny_checkpoint: TinyCheckpoint) -> None:
    config = open_source(
        tiny_checkpoint("mixtral")
    ).config  # D 32, F 48, 4 heads of 8, 2 key heads, 2 layers, V 96
    attention = 32 * 32 * 2 + 32 * 16 * 2
    layer = attention + 2 * 3 * 32 * 48 + 3 * 32 + 2 * 32
    assert cost.prefill_flops(config, 1) == 2 * (2 * layer + 32) + 2 * 4 * 4 * 8 + 2 * 96 * 32
    one_expert = replace(config, num_experts_per_tok=1)
    assert cost.prefill_flops(config, 5) - cost.prefill_flops(one_expert, 5) == 5 * 2 * 2 * 3 * 32 * 48


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_positions_seen(tokens: int, window: int | None) -> None:
    assert cost.positions_seen(tokens, window) == sum(min(p, window or p) for p in range(1, tokens + 1))


def test_kv_bytes_of_sliding_and_full_layers(tiny_checkpoint: TinyCheckpoint) -> None:
    config = open_source(tiny_checkpoint("llama")).config  # 2 layers, 2 key heads of 8
    assert cost.kv_bytes(config, [10, 30], 2) == 2 * 2 * (2 * 8) * 40 * 2
    sliding = replace(config, sliding_window=12, sliding_layers=frozenset({1}))
    assert cost.kv_bytes(sliding, [10, 30], 2) == 2 * (2 * 8) * 2 * (40 + 22)
