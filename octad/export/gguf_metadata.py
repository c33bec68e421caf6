"""What a GGUF file of a model says about it: its architecture in llama.cpp and the values that its graph reads.

    form = gguf_form(source)                       # raises CheckpointError for what the format cannot hold
    add_metadata(writer, source.config, form, name="octad")

The facts are those of llama.cpp's graphs: "llama" rotates neighbouring pairs (so q and k are written interleaved),
always makes the weights of the chosen experts sum to 1, and reads biases where they are there; "qwen2moe" and "olmoe"
never do the former, "qwen3moe" always. So a mixture of Qwen2 models whose shared expert adds nothing is written as
"llama", which computes exactly what it computes.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from octad.checkpoint.gguf.metadata import INTERLEAVED, llama3_factors
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import shared_expert_adds_nothing
from octad.errors import CheckpointError
from octad.model.config import ModelConfig, RopeConfig
from octad.model.families import FAMILIES
from octad.model.rope import yarn_scale

if TYPE_CHECKING:
    from gguf import GGUFWriter

HEAD_OF_ITS_OWN = ("qwen2moe", "olmoe")  # the graph does not fall back on the embeddings
HEADS_FILL_WIDTH = ("qwen2", "qwen2moe", "olmoe")  # the graph takes q and o for square


@dataclass(frozen=True)
class Form:
    """How a model is written: llama.cpp's architecture, and whether a shared expert that adds nothing is left out."""

    architecture: str
    no_shared_expert: bool = False

    @property
    def interleaved(self) -> bool:
        """Whether rows of q and k are."""
        return self.architecture in INTERLEAVED

    @property
    def head(self) -> bool:
        """Whether a tied head is written out."""
        return self.architecture in HEAD_OF_ITS_OWN


def gguf_form(source: TensorSource) -> Form:
    """The form of a source's model. Raises CheckpointError with what llama.cpp's graph cannot compute."""
    config = source.config
    family = FAMILIES[config.model_type]
    if config.model_type == "qwen2_moe" and config.norm_topk_prob and shared_expert_adds_nothing(source):
        form = Form("llama", no_shared_expert=True)
    else:
        form = Form(family.gguf)
    if reason := _why_not(config, form):
        raise CheckpointError(f"{source.label}: cannot be written as GGUF: {reason}")
    return form


def _why_not(config: ModelConfig, form: Form) -> str | None:
    """What the architecture's graph cannot compute, if anything."""
    architecture, family = form.architecture, FAMILIES[config.model_type]
    if config.sliding_layers:
        return f"llama.cpp's {architecture} attends to everything, this model slides over {config.sliding_window}"
    if reason := _why_not_rope(config.rope):
        return reason
    if (
        architecture in HEADS_FILL_WIDTH
        and config.num_attention_heads * config.head_dim != config.hidden_size
    ):
        return (
            f"llama.cpp's {architecture} has heads that fill the width, here {config.num_attention_heads} x"
            f" {config.head_dim} are not {config.hidden_size}"
        )
    if config.qk_norm == "full" and config.num_key_value_heads != config.num_attention_heads:
        return f"llama.cpp's {architecture} has as many key as query heads"
    if config.clip_qkv is not None:
        return f"llama.cpp's {architecture} does not clip q, k and v (clip_qkv {config.clip_qkv:g})"
    if (config.o_bias or config.mlp_bias or (config.qkv_bias and architecture == "qwen3moe")) and (
        architecture != "llama"
    ):
        return f"llama.cpp's {architecture} has no place for these biases"
    if not config.is_moe or architecture == "llama":
        return (
            None
            if not (config.is_moe and config.dense_layers)
            else f"{architecture} has experts in all layers"
        )
    if config.norm_topk_prob != family.gguf_norm_topk:
        does = "always" if family.gguf_norm_topk else "never"
        return f"llama.cpp's {architecture} {does} makes the chosen experts' weights sum to 1, this model does not agree"
    if config.dense_layers:
        return f"llama.cpp's {architecture} has experts in all layers, this model not in {len(config.dense_layers)}"
    return None


def _why_not_rope(rope: RopeConfig) -> str | None:
    """What llama.cpp, which reads YaRN's factor and original context alone, computes otherwise."""
    if rope.type not in ("default", "linear", "yarn", "llama3"):
        return f"rope scaling {rope.type!r} has no place in it"
    if rope.type != "yarn":
        return None
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    for key, value in usual.items():
        if rope.get(key, value) != value:
            return f"YaRN with {key} {rope.get(key)} has no place in it"
    if abs(yarn_scale(rope) - yarn_scale(replace(rope, parameters=(("factor", rope.get("factor")),)))) > 1e-4:
        return f"YaRN with an attention scale of its own ({yarn_scale(rope):g}) has no place in it"
    return None


def add_metadata(writer: GGUFWriter, config: ModelConfig, form: Form, name: str) -> None:
    """The keys of the architecture."""
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    as_llama = config.is_moe and form.architecture in (
        "llama",
        "olmoe",
    )  # one width, under the dense nets' key
    writer.add_feed_forward_length(config.moe_intermediate_size if as_llama else config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    _add_scaling(writer, config)
    if config.is_moe:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if not as_llama:
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if config.shared_expert_intermediate_size and not form.no_shared_expert:
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_scaling(writer: GGUFWriter, config: ModelConfig) -> None:
    from gguf.constants import RopeScalingType

    given: dict[str, Any] = dict(config.rope.parameters)
    if config.rope.type == "llama3":  # its factors are a tensor; readers tell from this whose they are
        writer.add_rope_scaling_orig_ctx_len(llama3_context(config.rope))
    if config.rope.type not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(config.rope.type))
    writer.add_rope_scaling_factor(float(given["factor"]))
    if config.rope.type == "yarn":
        original = given.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))


def rope_factors(config: ModelConfig) -> torch.Tensor | None:
    """By what each rotary frequency is divided, [head_dim / 2] float32, for Llama 3's scaling; None for any other."""
    if config.rope.type != "llama3":
        return None
    given: dict[str, Any] = dict(config.rope.parameters)
    usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if any(given.get(key, value) != value for key, value in usual.items()):
        raise CheckpointError(
            "Llama 3's rope scaling with other than the usual low and high factors (1 and 4)"
        )
    return torch.tensor(
        llama3_factors(
            config.rope.theta, config.head_dim, float(given["factor"]), llama3_context(config.rope)
        )
    )


def llama3_context(rope: RopeConfig) -> int:
    """How many tokens the model saw before its positions were scaled."""
    return int(rope.get("original_max_position_embeddings", 8192))
