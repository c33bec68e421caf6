"""The mixture layer against algebra worked out by hand."""

import torch
import torch.nn.functional as F

from octad.kernels.attention import causal_attention, causal_attention_reference
from octad.model.config import ModelConfig
from octad.model.moe import Experts, FixedRouter, MoE, Router

CONFIG = ModelConfig.from_dict(
    {
        "model_type": "mixtral",
        "vocab_size": 8,
        "hidden_size": 2,
        "intermediate_size": 1,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    }
)


def test_mixture_by_hand() -> None:
    layer = MoE(CONFIG)
    layer.gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    layer.experts.gate_up_proj.data = torch.tensor(
        [[[1.0, 0], [0, 1]], [[2.0, 0], [0, 1]], [[0.0, 0], [0, 0]]]
    )
    layer.experts.down_proj.data = torch.tensor([[[1.0], [0]], [[0.0], [1]], [[9.0], [9]]])
    x = torch.tensor([[[1.0, 3.0]]])
    # logits 1, 3, -4: experts 1 and 0 with weights 1/(1+e^-2) and 1/(1+e^2)
    first, second = 1 / (1 + torch.exp(torch.tensor(-2.0))), 1 / (1 + torch.exp(torch.tensor(2.0)))
    silu = F.silu(torch.tensor([1.0, 2.0]))
    expected = torch.stack((second * silu[0] * 3, first * silu[1] * 3))
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_router_weights_sum_to_one_and_are_sorted() -> None:
    router = Router(CONFIG)
    torch.nn.init.normal_(router.weight)
    weights, experts = router(torch.randn(50, 2))
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    assert (weights[:, 0] >= weights[:, 1]).all()
    assert (experts[:, 0] != experts[:, 1]).all()


def test_fixed_router_gives_one_expert_alone() -> None:
    experts = Experts(CONFIG)
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, 2)
    torch.testing.assert_close(experts(x, *FixedRouter([2])(x)), experts.expert(2, x))
    blend = experts(x, *FixedRouter([0, 2], [0.25, 0.75])(x))
    torch.testing.assert_close(blend, 0.25 * experts.expert(0, x) + 0.75 * experts.expert(2, x))


def test_attention_equals_its_slow_twin() -> None:
    torch.manual_seed(0)
    for S, T, window in (
        (1, 1, None),
        (9, 9, None),
        (1, 20, None),
        (5, 20, None),
        (20, 20, 6),
        (1, 20, 6),
        (4, 20, 6),
    ):
        q, k, v = torch.randn(2, S, 6, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 8)
        torch.testing.assert_close(
            causal_attention(q, k, v, window=window), causal_attention_reference(q, k, v, window=window)
        )
