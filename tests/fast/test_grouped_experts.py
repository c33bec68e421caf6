"""Experts as grouped products against the loop that defines them: outputs, gradients, dropped choices."""

import pytest
import torch
from tiny_models import make_model

from octad.fast.grouped_experts import GroupedExperts, can_group, group_experts
from octad.model.config import ModelConfig
from octad.model.moe import Experts
from octad.model.transformer import Transformer

E, N, D, F = 5, 40, 16, 12


def experts(dtype: torch.dtype = torch.float32, width: int = F) -> Experts:
    torch.manual_seed(0)
    small = make_model("mixtral", hidden_size=D, intermediate_size=width, num_local_experts=E).config
    made = Experts(ModelConfig.from_dict(small.to_dict())).to(dtype)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


def choices(count: int, *, dropped: bool = False) -> torch.Tensor:
    """Of `count` experts a token, none of them expert 2."""
    found = torch.tensor([0, 1, 3, 4])[torch.rand(N, 4).argsort(1)[:, :count]]
    if dropped:
        found[::3, -1] = -1
    return found


@pytest.mark.parametrize("rank", [None, 4, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_they_equal_the_loop(count: int, rank: int | None) -> None:
    loop = experts()
    mine = GroupedExperts(loop)
    leaves, sums = [], dict(loop.named_parameters())
    if rank is None:
        leaves += sums.values()
    else:
        pairs = {
            n: (torch.randn(E, rank, w.shape[2]), torch.randn(E, w.shape[1], rank)) for n, w in sums.items()
        }
        mine.change({n.removesuffix("_proj"): pair for n, pair in pairs.items()}, 0.7)
        factors = {n: mine.factors(n.removesuffix("_proj")) for n in sums}
        leaves += [part for pair in factors.values() for part in pair]
        sums = {n: w + 0.7 * factors[n][1] @ factors[n][0] for n, w in sums.items()}
    x, weights = torch.randn(N, D, requires_grad=True), torch.rand(N, count, requires_grad=True)
    chosen = choices(count, dropped=True)
    got = mine(x, weights, chosen)
    kept = weights * (chosen >= 0)
    want = torch.func.functional_call(loop, sums, (x, kept, chosen.clamp_min(0)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(got)
    found = (torch.autograd.grad(y, [x, weights, *leaves], seed) for y in (got, want))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_frozen_experts_get_no_gradient_but_pass_one_on() -> None:
    loop = experts().requires_grad_(False)
    x = torch.randn(N, D, requires_grad=True)
    GroupedExperts(loop)(x, torch.rand(N, 2), choices(2)).sum().backward()
    assert loop.gate_up_proj.grad is None
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_bfloat16_is_as_near_to_the_truth_as_the_loop() -> None:
    loop, exact = experts(torch.bfloat16, 16), experts(torch.float64, 16)
    exact.load_state_dict(loop.state_dict())
    x, weights, chosen = torch.randn(N, D).bfloat16(), torch.rand(N, 3), choices(3)
    truth = exact(x.double(), weights, chosen)
    errors = [(m(x, weights, chosen) - truth).norm().item() for m in (GroupedExperts(loop), loop)]
    assert errors[0] < 1.1 * errors[1]


def test_sizes_that_grouped_products_cannot_take_keep_the_loop() -> None:
    config = make_model("mixtral", intermediate_size=48).config.to_dict()
    fits, odd = (ModelConfig.from_dict(config | {"intermediate_size": width}) for width in (48, 46))
    assert can_group(Experts(fits))
    assert not can_group(Experts(odd).bfloat16())
    for sizes, kind in ((fits, GroupedExperts), (odd, Experts)):
        model = Transformer(sizes).bfloat16()
        names = [name for name, _ in model.named_parameters()]
        group_experts(model)
        assert all(type(layer.mlp.experts) is kind for layer in model.model.layers)
        assert [name for name, _ in model.named_parameters()] == names
