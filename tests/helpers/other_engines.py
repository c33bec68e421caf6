"""Models to show other engines: tiny, random, of every form that octad writes, with a tokenizer; and a text for them.

They are wilder than trained ones, so that rows, experts or biases mixed up change the perplexity by per cents."""

import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from octad.text.tokenizer import Tokenizer

VOCABULARY = 320
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
SUMS = {"norm_topk_prob": True}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    """Rope settings whose original context is shorter than the texts, so that they matter."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, linear": ("llama", _rope("linear", factor=4.0)),
    "llama, yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama, llama3": ("llama", _rope("llama3", **_LLAMA3, original_max_position_embeddings=64)),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, yarn": ("qwen2", _rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 8}),
    "mixtral, one expert a token": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"norm_topk_prob": False}),
    "mixture of qwen2": ("qwen2_moe", EXPERTS | SUMS),
    "qwen3_moe": ("qwen3_moe", EXPERTS | SUMS | {"mlp_only_layers": []}),
    "olmoe": ("olmoe", {"num_experts": 8, "norm_topk_prob": False, "num_key_value_heads": 4}),
}


def words(count: int) -> str:
    """A text of made-up words, the same each time."""
    draw = random.Random(3)
    return " ".join(
        "".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(1, 7))) for _ in range(count)
    )


def trained_tokenizer() -> Tokenizer:
    """All bytes and a few merges, as the tokenizers library trains them."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    core.train_from_iterator([words(500)], trainer)
    assert core.get_vocab_size() == VOCABULARY
    return Tokenizer(core, {"eos_token": "<|end|>"}, [0])


def save_case(case: str, path: Path, **changes: Any) -> Path:
    """The case's model in `path`, in bfloat16, with its tokenizer."""
    family, own = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": VOCABULARY, "dtype": torch.bfloat16}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    model = make_model(family, **sizes | ids | own | changes)
    model.save_pretrained(path, save_original_format=True)
    if case == "mixture of qwen2":
        _silence_shared_expert(path)
    trained_tokenizer().save(path)
    return path


def _silence_shared_expert(path: Path) -> None:
    """What octad combine makes of Qwen2 models: a shared expert of zeros."""
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".shared_expert" in name:
            tensor.zero_()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
