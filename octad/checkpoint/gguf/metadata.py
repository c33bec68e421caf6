"""GGUF metadata -> a dict in the words of config.json.

    raw = config_dict(header, rope_factors=None, dtype="bfloat16")

Architectures: llama (with expert_count: mixtral, or with biases too: a mixture of Qwen2 models), qwen2, qwen3,
qwen2moe, qwen3moe, olmoe. The keys are those
of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the converter leaves out (whether a family
normalises its routing weights, say) is a fact of the architecture in llama.cpp and stands in model/families.py. A
key that changes the arithmetic and is not understood is refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octad.checkpoint.gguf.header import GGUFHeader, GGUFTensor
from octad.errors import CheckpointError, ConfigError
from octad.model.config import ModelConfig
from octad.model.families import FAMILIES, INERT_SHARED_EXPERT

# llama.cpp's name -> the family; its "llama" is told apart below
FAMILY: Mapping[str, str] = {
    family.gguf: name for name, family in FAMILIES.items() if name not in ("mistral", "mixtral")
}
# where llama.cpp rotates neighbours: rows of q and k, and their biases, lie otherwise, head by head
INTERLEAVED = ("llama",)
_UNDERSTOOD = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "expert_weights_norm",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.clamp_kqv",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_SOFTMAX_GATING = 1
_MOST_EXPERTS = 4096
ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


class Metadata:
    """The values of one architecture: `get("block_count")` reads `llama.block_count`."""

    def __init__(self, path: Path, values: Mapping[str, Any], architecture: str) -> None:
        self.path, self.values, self.architecture = path, values, architecture

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{architecture}.{key}`; a per-layer list that holds one value throughout counts as
        that value.
        """
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, (list, tuple)):
            return value
        if len(set(value)) != 1:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.{key} differs from layer to layer; not supported"
            )
        return value[0]

    def need(self, key: str) -> Any:
        """As `get`; a missing key raises CheckpointError."""
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lack {self.architecture}.{key}")
        return value

    def refuse_unknown(self) -> None:
        """CheckpointError for a key of this architecture that would change the arithmetic and is not
        understood.
        """
        prefix = f"{self.architecture}."
        for name in self.values:
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in _UNDERSTOOD and not _inert(key, self.values[name]):
                shown = repr(self.values[name])[:60]
                raise CheckpointError(
                    f"{self.path}: {name} = {shown} is not supported; use the original checkpoint"
                )


def _inert(key: str, value: Any) -> bool:
    if key == "expert_gating_func":
        return bool(value == _SOFTMAX_GATING)
    return not value or (key.endswith(("_scale", "attn_factor")) and value == 1)


def config_of(
    header: GGUFHeader, rope_factors: Sequence[float] | None = None, dtype: str = "bfloat16"
) -> ModelConfig:
    """The config that a file's metadata describe. `rope_factors` as for config_dict; where they are not given, those of a
    file that holds them in float32, as all that llama.cpp writes do. Raises CheckpointError."""
    try:
        if rope_factors is None and (tensor := header.tensors.get(ROPE_FACTORS)) is not None:
            rope_factors = _floats(header.path, tensor)
        return ModelConfig.from_dict(config_dict(header, rope_factors, dtype))
    except ConfigError as error:
        raise CheckpointError(f"{header.path}: its metadata, read as {error}") from error
    except (OSError, struct.error, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{header.path}: the metadata are damaged: {error}") from error


def _floats(path: Path, tensor: GGUFTensor) -> list[float]:
    if tensor.type != 0:
        raise CheckpointError(f"{path}: {ROPE_FACTORS} is not in float32")
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.numel}f", file.read(4 * tensor.numel)))


def config_dict(header: GGUFHeader, rope_factors: Sequence[float] | None, dtype: str) -> dict[str, Any]:
    """What config.json of the same model would say. `rope_factors`: the values of the tensor
    rope_freqs.weight, if any.
    """
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in FAMILY:
        known = ", ".join(FAMILY)
        raise CheckpointError(
            f"{header.path}: architecture {architecture!r} is not supported (supported: {known})"
        )
    if (parts := header.metadata.get("split.count", 1)) > 1:
        raise CheckpointError(
            f"{header.path}: one of {parts} parts; join them first with `llama-gguf-split --merge`"
        )
    meta = Metadata(header.path, header.metadata, architecture)
    meta.refuse_unknown()
    if meta.get("attention.causal", True) is False:
        raise CheckpointError(
            f"{header.path}: {architecture}.attention.causal is false; octad reads causal decoders"
        )
    family = _family(meta, header)
    raw = {"architectures": [FAMILIES[family].architecture], "model_type": family, "torch_dtype": dtype}
    return (
        raw
        | _shape(meta, header)
        | _rope(meta, rope_factors)
        | _experts(meta, family)
        | _token_ids(header.metadata)
    )


def _family(meta: Metadata, header: GGUFHeader) -> str:
    """llama.cpp's "llama" is Llama, with experts Mixtral, with experts and biases a mixture of Qwen2 models."""
    if meta.architecture != "llama" or not meta.get("expert_count"):
        return FAMILY[meta.architecture]
    return "qwen2_moe" if "blk.0.attn_q.bias" in header.tensors else "mixtral"


def _shape(meta: Metadata, header: GGUFHeader) -> dict[str, Any]:
    hidden, heads = meta.need("embedding_length"), meta.need("attention.head_count")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{header.path}: the tensor token_embd.weight is missing")
    layers, clip = meta.need("block_count"), meta.get("attention.clamp_kqv")
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{header.path}: {layers} layers, but only {len(header.tensors)} tensors; fetch it again"
        )
    return {
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", heads),
        "head_dim": _head_dim(meta, hidden, heads),
        "max_position_embeddings": meta.get("context_length", 2048),
        "rms_norm_eps": _short(meta.need("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        **({"clip_qkv": clip} if clip else {}),
    }


def _head_dim(meta: Metadata, hidden: int, heads: int) -> int:
    head_dim = int(meta.get("attention.key_length", hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := meta.get(key, head_dim)) != head_dim:
            name = f"{meta.architecture}.{key}"
            raise CheckpointError(
                f"{meta.path}: {name} {other} differs from the head size {head_dim}; not supported"
            )
    return head_dim


def _short(value: float) -> float:
    """The shortest decimal that a 32-bit float stands for: 9.999999747378752e-06 was 1e-05."""
    return float(f"{value:.7g}")


def _experts(meta: Metadata, family: str) -> dict[str, Any]:
    count = meta.get("expert_count")
    if not count:
        return {}
    if count > _MOST_EXPERTS:
        raise CheckpointError(
            f"{meta.path}: {count} experts (at most {_MOST_EXPERTS} are believed); fetch it again"
        )
    names: dict[str, Any] = {"num_experts_per_tok": meta.need("expert_used_count")}
    if family == "mixtral":
        return names | {"num_local_experts": count}
    norm = bool(meta.get("expert_weights_norm", FAMILIES[family].gguf_norm_topk))
    names |= {"num_experts": count, "norm_topk_prob": norm}
    if family == "olmoe":
        return names
    as_llama = meta.architecture == "llama"
    names |= {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": meta.need(
            "feed_forward_length" if as_llama else "expert_feed_forward_length"
        ),
    }
    if as_llama:
        names |= {"norm_topk_prob": True, "shared_expert_intermediate_size": INERT_SHARED_EXPERT}
    elif family == "qwen2_moe":
        names["shared_expert_intermediate_size"] = meta.need("expert_shared_feed_forward_length")
    return names


def _rope(meta: Metadata, factors: Sequence[float] | None) -> dict[str, Any]:
    """rope_theta and rope_scaling, in config.json's older layout."""
    theta = _short(meta.get("rope.freq_base", 10000.0))
    factor = meta.get("rope.scaling.factor") or meta.get("rope.scale_linear") or 1.0
    kind = meta.get("rope.scaling.type", "linear" if factor != 1.0 else "none")
    scaling: dict[str, Any] | None = None
    if factors is not None and any(abs(f - 1.0) > 1e-6 for f in factors):
        scaling = _llama3_scaling(meta, theta, factors)
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor != 1.0:
        original = meta.need("rope.scaling.original_context_length")
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{meta.path}: rope scaling {kind!r} is not supported (supported: none, linear, yarn)"
        )
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(meta: Metadata, theta: float, factors: Sequence[float]) -> dict[str, Any]:
    """The parameters whose llama3 factors are those stored; refused if the usual ones (Llama 3.1 to 3.3) are
    not.
    """
    context = meta.get("rope.scaling.original_context_length", _LLAMA3_CONTEXT)
    factor = _short(max(factors))
    expected = llama3_factors(theta, 2 * len(factors), factor, context)
    if any(abs(a - b) > 1e-4 * b for a, b in zip(factors, expected, strict=True)):
        raise CheckpointError(
            f"{meta.path}: rope_freqs.weight is not Llama 3's scaling of factor {factor:g} over {context}"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }


def llama3_factors(theta: float, head_dim: int, factor: float, context: int) -> list[float]:
    """By what Llama 3.1 divides each of the head_dim / 2 rotary frequencies: 1 where fast, `factor` where
    slow.
    """
    factors = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * math.pi * theta ** (i / head_dim))
        smooth = min(1.0, max(0.0, (turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id (a list where a turn ends with a token of its own)."""
    ends = [
        values[key]
        for key in (f"tokenizer.ggml.{n}_token_id" for n in ("eos", "eot", "eom"))
        if key in values
    ]
    ends = list(dict.fromkeys(ends))
    eos = ends[0] if len(ends) == 1 else ends or None
    return {"bos_token_id": values.get("tokenizer.ggml.bos_token_id"), "eos_token_id": eos}
