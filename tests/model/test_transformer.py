"""The decoder against transformers: equal logits in float32 and equal routing, for every family and its switches."""

import pytest
import torch
import transformers

from octad.model import cost
from octad.model.cache import ContiguousCache
from octad.model.config import ModelConfig
from octad.model.moe import Router
from octad.model.transformer import Transformer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN2_MOE = {"num_experts": 5, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
QWEN3_MOE = {"num_experts": 6, "moe_intermediate_size": 32, "num_experts_per_tok": 3}

CASES = {
    "llama": ("Llama", {}),
    "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-linear-biases": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-full-heads": ("Llama", {"num_key_value_heads": 4}),
    "mistral-sliding": ("Mistral", {"sliding_window": 7, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral-sliding-top1": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 11},
    ),
    "qwen2-moe": ("Qwen2Moe", {**QWEN2_MOE, "decoder_sparse_step": 2}),
    "qwen2-moe-sliding": (
        "Qwen2Moe",
        {**QWEN2_MOE, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "qwen3-moe": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-unnormalised": ("Qwen3Moe", {**QWEN3_MOE, "head_dim": 32}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "olmoe-clipped": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
}


def pair(name: str) -> tuple[torch.nn.Module, Transformer]:
    """A random transformers model and ours with the same weights."""
    torch.manual_seed(0)
    family, options = CASES[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for parameter in theirs.parameters():  # norms and biases away from ones and zeros
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1, 0.3)
    ours = Transformer(ModelConfig.from_dict(config.to_dict())).eval()
    state = dict(theirs.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_transformers(name: str) -> None:
    theirs, ours = pair(name)
    tokens = torch.randint(0, 128, (2, 100))
    expected = theirs(tokens).logits
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours(tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [n for n, (f, _) in CASES.items() if "Moe" in f or f in ("Mixtral", "Olmoe")]
)
@torch.no_grad()
def test_routing_equals_transformers(name: str) -> None:
    theirs, ours = pair(name)
    chosen: list[torch.Tensor] = []
    for module in ours.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda m, args, out: chosen.append(out[1]))
    tokens = torch.randint(0, 128, (2, 60))
    ours(tokens)
    logits = theirs(tokens, output_router_logits=True).router_logits
    assert len(chosen) == len(logits) > 0
    for mine, their in zip(chosen, logits, strict=True):
        assert torch.equal(mine, their.topk(mine.shape[1], dim=-1).indices)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_parameter_counts(name: str) -> None:
    theirs, ours = pair(name)
    assert cost.parameters(ours.config) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_cached_equals_uncached(name: str) -> None:
    theirs, ours = pair(name)
    tokens = torch.randint(0, 128, (2, 40))
    cache = ContiguousCache(ours.config, batch=2, capacity=40)
    pieces = [ours(tokens[:, start:end], cache) for start, end in ((0, 17), (17, 30), (30, 31), (31, 40))]
    torch.testing.assert_close(torch.cat(pieces, 1), theirs(tokens).logits, atol=2e-5, rtol=1e-5)
