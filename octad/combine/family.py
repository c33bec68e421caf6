"""Output families: which public mixture architecture represents eight copies of a base exactly, or why none does.

    llama, mistral -> mixtral     qwen3 -> qwen3_moe     qwen2 -> qwen2_moe with an inert shared expert

The config is written in the layout that transformers, vLLM, SGLang and llama.cpp's converter read, rope in the older
keys that all of them know. What the target has no field for is refused with the reason, never approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octad.errors import RecipeError
from octad.model.config import ModelConfig
from octad.model.families import FAMILIES, INERT_SHARED_EXPERT

TARGETS = {name: family.mixture for name, family in FAMILIES.items() if family.mixture}
CARRIED = ("pad_token_id", "bos_token_id", "eos_token_id", "initializer_range", "attention_dropout")


def mixture_config(
    base: ModelConfig, num_experts: int, top_k: int, dtype: str, vocab_size: int, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """config.json of the mixture. `ends`: ids that end a text beside the base's.

    Raises RecipeError naming what the target family cannot hold."""
    target = TARGETS.get(base.model_type)
    if target is None:
        raise RecipeError(
            f"base is a {base.model_type} model; members must be dense: {', '.join(TARGETS)} "
            "(to change an existing mixture use `octad expert`)"
        )
    if reason := _not_representable(base, target):
        raise RecipeError(f"base ({base.model_type}) has {reason}, for which {target} has no place")
    return {
        "architectures": [FAMILIES[target].architecture],
        "model_type": target,
        "vocab_size": vocab_size,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "num_hidden_layers": base.num_hidden_layers,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": base.num_key_value_heads,
        "head_dim": base.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": base.max_position_embeddings,
        "rms_norm_eps": base.rms_norm_eps,
        **base.rope.to_dict(),
        "tie_word_embeddings": base.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        **_carried(base, vocab_size, ends),
        **_target_keys(base, target, num_experts),
    }


def _carried(base: ModelConfig, rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """What the base says that stays as it is, and where its answers end: with `ends`, and at no id without a row."""
    found = {key: base.raw[key] for key in CARRIED if base.raw.get(key) is not None}
    held = [i for i in dict.fromkeys((*base.eos_token_ids, *ends)) if i < rows]
    if ends or len(held) < len(set(base.eos_token_ids)):
        found["eos_token_id"] = held or None
    return found


def _target_keys(base: ModelConfig, target: str, num_experts: int) -> dict[str, Any]:
    """What only this family's config has."""
    if target == "mixtral":
        return {
            "num_local_experts": num_experts,
            "sliding_window": base.sliding_window,
            "router_jitter_noise": 0.0,
        }
    keys: dict[str, Any] = {
        "num_experts": num_experts,
        "moe_intermediate_size": base.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": bool(base.sliding_layers),
        "sliding_window": base.sliding_window,
    }
    if target == "qwen3_moe":
        return keys | {"attention_bias": base.qkv_bias}
    layers = range(base.num_hidden_layers)
    kinds = ["sliding_attention" if i in base.sliding_layers else "full_attention" for i in layers]
    return keys | {
        "shared_expert_intermediate_size": INERT_SHARED_EXPERT,
        "qkv_bias": base.qkv_bias,
        "max_window_layers": base.num_hidden_layers,
        "layer_types": kinds,
    }


def _not_representable(base: ModelConfig, target: str) -> str | None:
    if base.mlp_bias:
        return "biases in its feed-forward networks"
    if target == "mixtral" and (base.qkv_bias or base.o_bias):
        return "biases in its attention"
    everywhere = len(base.sliding_layers) in (0, base.num_hidden_layers)
    if target in ("mixtral", "qwen3_moe") and not everywhere:
        return "sliding-window attention in some layers only"
    return None
