"""The feed-forward network for training against MLP and its low-rank layers: outputs and gradients, in slices."""

import pytest
import torch
from torch import nn

from octad.fast import products
from octad.fast.training_experts import TrainMLP, swap_dense
from octad.model.moe import MLP
from octad.train.lowrank import LowRankLinear
from octad.train.sections import LowRankSpec


def network(*, low_rank: bool, learns: bool, dtype: torch.dtype = torch.float64) -> MLP:
    torch.manual_seed(0)
    mlp = MLP(6, 10).to(dtype).requires_grad_(learns)
    if low_rank:
        for name, layer in list(mlp.named_children()):
            wrapped = LowRankLinear(layer, LowRankSpec(rank=2, alpha=6))  # type: ignore[arg-type]
            nn.init.normal_(wrapped.lora_B)
            setattr(mlp, name, wrapped)
    return mlp


@pytest.mark.parametrize(("low_rank", "learns"), [(False, True), (True, False), (True, True), (False, False)])
def test_it_equals_the_plain_network(monkeypatch, low_rank: bool, learns: bool) -> None:
    """What learns is told by the parameters; seven rows in slices of two."""
    monkeypatch.setattr(products, "CACHED", 20)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "SIZE", 1)
    assert len(list(products.slices(slice(0, 7), torch.empty(0, 10)))) > 2
    plain = network(low_rank=low_rank, learns=learns)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 6, dtype=torch.float64)
    leaves = [x, *(p for p in plain.parameters() if p.requires_grad)]
    expected = plain(x)
    y = TrainMLP(plain)(x)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, leaves, dy)
    for mine, theirs in zip(found, torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_one_matrix_may_learn_alone(monkeypatch) -> None:
    monkeypatch.setattr(products, "CACHED", 20)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "SIZE", 1)
    assert len(list(products.slices(slice(0, 7), torch.empty(0, 10)))) > 2
    for name in ("gate_proj", "up_proj", "down_proj"):
        plain = network(low_rank=False, learns=False)
        weight = plain.get_submodule(name).weight.requires_grad_()
        x = torch.randn(5, 6, dtype=torch.float64)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), [weight])
        (found,) = torch.autograd.grad(TrainMLP(plain)(x).square().sum(), [weight])
        torch.testing.assert_close(found, expected)


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_network() -> None:
    plain = network(low_rank=True, learns=True, dtype=torch.bfloat16)
    exact = network(low_rank=True, learns=True, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    x = torch.randn(300, 6, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(300, 6, dtype=torch.bfloat16)

    def results(module: nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
        y = module(given)
        return [y.detach(), *torch.autograd.grad(y, [given, *module.parameters()], dy.to(y.dtype))]

    truth = results(exact, x.detach().double().requires_grad_())
    for mine, theirs, true in zip(results(TrainMLP(plain), x), results(plain, x), truth, strict=True):
        errors = [float((t.double() - true).norm() / true.norm()) for t in (mine, theirs)]
        assert errors[0] < max(1.5 * errors[1], 0.004)


def test_swapping_keeps_names_and_leaves_biases_alone() -> None:
    model = nn.Sequential(MLP(6, 10), MLP(6, 10, bias=True))
    names = [name for name, _ in model.named_parameters()]
    swap_dense(model)
    assert [type(m) for m in model] == [TrainMLP, MLP]
    assert [name for name, _ in model.named_parameters()] == names
