"""Blocks for training against the model's own: hidden states and every gradient, low-rank layers and norms included."""

import pytest
import torch
from torch import nn

from octad.fast.document_attention import DocumentAttention
from octad.fast.products import projected, slices
from octad.fast.training_blocks import quicken
from octad.model.config import ModelConfig
from octad.model.transformer import Transformer
from octad.train.lowrank import LowRankLinear, add_low_rank
from octad.train.sections import LowRankSpec


def config(family: str) -> ModelConfig:
    raw = {"model_type": family, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "head_dim": 4}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return ModelConfig.from_dict(raw)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_quickened_model_is_the_same(family: str, low_rank: bool, dtype: torch.dtype) -> None:
    """qwen2 has biases, qwen3 norms of its heads; all parameters learn. The native passes are for float32."""
    torch.manual_seed(0)
    plain, quick = Transformer(config(family)).to(dtype), Transformer(config(family)).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for model in (plain, quick):
        if low_rank:
            add_low_rank(model, r"_proj$", LowRankSpec(rank=2, alpha=6))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    quick.load_state_dict(plain.state_dict())
    quicken(quick)
    assert [n for n, _ in quick.named_parameters()] == [n for n, _ in plain.named_parameters()]
    tokens, documents = torch.randint(0, 11, (2, 9)), torch.zeros(2, 9, dtype=torch.int64)
    found, expected = (m(tokens, DocumentAttention(m.config, documents)) for m in (quick, plain))
    torch.testing.assert_close(found, expected, **near)
    torch.testing.assert_close(quick(tokens), plain(tokens), **near)
    for y in (found, expected):
        y.square().sum().backward()
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **near, msg=name)


def test_projections_of_one_input(monkeypatch) -> None:
    """A frozen layer, one with a bias and a low-rank one, in slices of two rows."""
    monkeypatch.setattr("octad.fast.products.CACHED", 12)
    monkeypatch.setattr("octad.fast.products.LEAST", 1)
    monkeypatch.setattr("octad.fast.products.SIZE", 1)
    assert len(list(slices(slice(0, 7), torch.empty(0, 6)))) > 2
    torch.manual_seed(0)
    layers = [nn.Linear(6, 3, bias=False), nn.Linear(6, 5), nn.Linear(6, 4)]
    layers[0].requires_grad_(False)
    low = LowRankLinear(layers[2], LowRankSpec(rank=2, alpha=6))
    nn.init.normal_(low.lora_B)
    x = torch.randn(7, 6, requires_grad=True)
    change = low.scale * (x @ low.lora_A.T) @ low.lora_B.T
    expected = [layers[0](x), layers[1](x), layers[2](x) + change]
    found = projected(x, layers[0], layers[1], low)
    leaves = [x, layers[1].weight, layers[1].bias, low.lora_A, low.lora_B, layers[2].weight]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    sums = [sum(y.square().sum() for y in ys) for ys in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(s, leaves) for s in sums), strict=True):
        torch.testing.assert_close(one, other)
