"""Tiny random models of every family, made by transformers itself: the oracle's own files. Tests import them from here;
the fixtures are conftest's, a name that every directory may use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
}

TinyModel = Callable[..., transformers.PreTrainedModel]
TinyCheckpoint = Callable[..., Path]
Outcome = tuple[int, str, str]
Octad = Callable[..., Outcome]


def make_model(family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model in eval mode; norms and biases are random too, so that a mix-up shows."""
    settings = COMMON | OWN[family] | changes
    dtype = settings.pop("dtype", torch.float32)
    config = transformers.AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
