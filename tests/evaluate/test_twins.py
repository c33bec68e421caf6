"""Twins against numpy's correlation of whole weight vectors."""

import numpy as np
import pytest
import torch
from torch import nn

from octad.evaluate import twins
from octad.evaluate.twins import cosines_of, find_twins
from octad.fast.quantize import PackedExperts
from octad.model.config import ModelConfig
from octad.model.moe import Experts

RAW = {
    "model_type": "mixtral",
    "vocab_size": 8,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 1,
}


def make(count: int, seed: int = 0, spread: float = 0.05) -> Experts:
    """Fine-tunes of one net: the same weights and a little noise each."""
    torch.manual_seed(seed)
    experts = Experts(ModelConfig.from_dict(RAW | {"num_local_experts": count}))
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight.copy_(torch.randn(weight.shape[1:]) + spread * torch.randn(weight.shape))
    return experts


def copy(experts: Experts, a: int, b: int, noise: float = 0.0) -> None:
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            weight[b] = weight[a] + noise * torch.randn_like(weight[a])


def by_numpy(experts: Experts) -> np.ndarray:
    rows = (
        torch.cat([experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)], 1)
        .detach()
        .double()
        .numpy()
    )
    apart = rows - rows.mean(0)
    norms = np.linalg.norm(apart, axis=1)
    return apart @ apart.T / np.outer(norms, norms)


def test_cosines_are_those_of_the_whole_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "BLOCK", 4 * 100)  # several blocks, the last one shorter
    experts = make(4)
    copy(experts, 0, 3, noise=0.01)
    found = cosines_of(experts)
    assert found is not None
    np.testing.assert_allclose(found.numpy(), by_numpy(experts), atol=1e-5)
    assert found[0, 3] > 0.85
    assert abs(found[1, 2]) < 0.5


def test_fine_tunes_are_no_twins_and_copies_are() -> None:
    layers = [make(4, seed) for seed in range(3)]
    assert find_twins(layers, ["a", "b", "c", "d"]) == []
    for layer in layers:
        copy(layer, 1, 3)
    assert find_twins(layers, ["a", "b", "c", "d"]) == [{"a": "b", "b": "d", "cosine": 1.0}]
    copy(layers[0], 0, 3)  # in one layer of three they differ
    assert find_twins(layers, ["a", "b", "c", "d"]) == []


@pytest.mark.parametrize("count", [2, 3, 5])
def test_equal_experts_are_all_twins(count: int) -> None:
    layer = make(count, spread=0.0)
    names = [str(e) for e in range(count)]
    found = find_twins([layer], names)
    assert [(t["a"], t["b"]) for t in found] == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    assert all(t["cosine"] == 1.0 for t in found)


def test_two_different_experts_are_no_twins() -> None:
    assert find_twins([make(2)], ["a", "b"]) == []


def test_quantised_experts_are_read_and_unknown_ones_left_out() -> None:
    experts = make(3, spread=0.5)
    copy(experts, 0, 1)
    packed = PackedExperts.of(experts, (8, 8))
    found, exact = cosines_of(packed), cosines_of(experts)
    assert found is not None
    assert exact is not None
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0)
    assert cosines_of(nn.Identity()) is None
    assert find_twins([nn.Identity()], ["a", "b", "c"]) == []
