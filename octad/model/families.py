"""Every fact about a family of models, in one table. Imports nothing.

    FAMILIES["mixtral"].architecture, FAMILIES["qwen3"].mixture          # "MixtralForCausalLM", "qwen3_moe"
    FAMILIES["mixtral"].expert_name(layer=3, expert=7, part="down")      # the tensor, as the hub calls it
    FAMILIES["mixtral"].defaults["rope_theta"]                           # what config.json means where it is silent

A family is what `model_type` in config.json says. Four are dense, four are mixtures. Defaults are those of the family's
configuration class in transformers 5 (a test compares them with the installed one); token ids are left out, since the
tokenizer knows them better. What a GGUF file does not say, llama.cpp decides by the architecture's name: that is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["gate", "up", "down"]
QKNorm = Literal["none", "head", "full"]
# which layers slide where layer_types does not say it: none, all, from max_window_layers on, every other one below it
Sliding = Literal["never", "everywhere", "upper", "alternate"]
# hidden units of the shared expert that a mixture of Qwen2 models has to have, all zero: it adds exactly nothing
INERT_SHARED_EXPERT = 256
Switch = bool | str  # a bias that is always or never there, or the key of config.json that tells


@dataclass(frozen=True)
class Family:
    """One row of the table; keys are those of config.json, names those of the public checkpoints."""

    model_type: str
    architecture: str  # the class in transformers, which vLLM and SGLang know too
    gguf: str  # llama.cpp's name; its "llama" is also Mistral and, with an expert_count, Mixtral
    gguf_norm_topk: bool = True  # what llama.cpp's graph does where the metadata do not tell
    mixture: str | None = None  # of a dense family: the one that holds copies of it as experts, exactly
    member: str | None = None  # of a mixture: the dense family of one expert with the shared part
    qkv_bias: Switch = False
    o_bias: Switch = False
    mlp_bias: Switch = False
    qk_norm: QKNorm = "none"
    clips_qkv: bool = False  # heeds clip_qkv
    sliding: Sliding = "never"
    sliding_switch: bool = False  # slides only where use_sliding_window is true
    layer_types: bool = False  # heeds layer_types; the others slide everywhere whatever it says
    experts_keys: tuple[str, ...] = ()  # the names of the number of experts; none for dense families
    expert_width_key: str = "intermediate_size"
    always_normalised: bool = False  # the router's weights sum to 1, and norm_topk_prob is not read
    dense_layers: bool = False  # heeds decoder_sparse_step and mlp_only_layers
    shared_expert: bool = False  # has one, with a sigmoid gate of its own
    moe_block: str = "mlp"  # model.layers.N.{moe_block}.experts.E.{part}.weight
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_moe(self) -> bool:
        """True for mixtures."""
        return bool(self.experts_keys)

    def moe_prefix(self, layer: int) -> str:
        """Where a layer keeps its router and experts. Raises ValueError for a dense family."""
        if not self.is_moe:
            raise ValueError(
                f"{self.model_type!r} has no experts; families that have: {', '.join(MOE_FAMILIES)}"
            )
        return f"model.layers.{layer}.{self.moe_block}"

    def expert_name(self, layer: int, expert: int, part: Part) -> str:
        """The weight of one projection of one expert, as the family's checkpoints call it."""
        own = self.expert_parts[("gate", "up", "down").index(part)]
        return f"{self.moe_prefix(layer)}.experts.{expert}.{own}.weight"

    def router_name(self, layer: int) -> str:
        """The router's weight [E, D], as the family's checkpoints call it."""
        return f"{self.moe_prefix(layer)}.gate.weight"


_PLAIN = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}
_QWEN = _PLAIN | {"max_position_embeddings": 32768, "sliding_window": 4096}
_LATE = {"max_window_layers": 28}
_SPARSE = {"norm_topk_prob": False, "decoder_sparse_step": 1}

_TABLE = (
    Family(
        "llama",
        "LlamaForCausalLM",
        gguf="llama",
        mixture="mixtral",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=_PLAIN | {"max_position_embeddings": 2048},
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        gguf="llama",
        mixture="mixtral",
        sliding="everywhere",
        defaults=_PLAIN
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        gguf="qwen2",
        mixture="qwen2_moe",
        qkv_bias=True,
        sliding="upper",
        sliding_switch=True,
        layer_types=True,
        defaults=_QWEN | _LATE | {"num_key_value_heads": 32},
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        gguf="qwen3",
        mixture="qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        sliding="upper",
        sliding_switch=True,
        layer_types=True,
        defaults=_QWEN | _LATE | {"num_key_value_heads": 32, "head_dim": 128},
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        gguf="llama",
        member="llama",
        sliding="everywhere",
        experts_keys=("num_local_experts", "num_experts"),
        always_normalised=True,
        moe_block="block_sparse_moe",
        expert_parts=("w1", "w3", "w2"),
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        gguf="qwen2moe",
        gguf_norm_topk=False,
        member="qwen2",
        qkv_bias="qkv_bias",
        sliding="alternate",
        sliding_switch=True,
        layer_types=True,
        experts_keys=("num_experts",),
        expert_width_key="moe_intermediate_size",
        dense_layers=True,
        shared_expert=True,
        defaults=_QWEN
        | _LATE
        | _SPARSE
        | {
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        member="qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        sliding="everywhere",
        sliding_switch=True,
        experts_keys=("num_experts", "num_local_experts"),
        expert_width_key="moe_intermediate_size",
        dense_layers=True,
        defaults=_QWEN | _SPARSE | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        gguf="olmoe",
        gguf_norm_topk=False,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="full",
        clips_qkv=True,
        experts_keys=("num_experts", "num_local_experts"),
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "tie_word_embeddings": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _TABLE}
MOE_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.is_moe)
