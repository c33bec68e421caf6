"""Router fits: closed forms from numpy, optimality conditions, and prompts by hand."""

import numpy as np
import pytest
import torch

from octad.combine import router
from octad.combine.statistics import Statistics, add_gram, pack, unpack

E, D = 4, 12


def clouds(seed: int = 0, most: int = 80) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_ND of E overlapping clouds of different sizes, weight_N, label_N."""
    torch.manual_seed(seed)
    sizes = [most // (e + 1) for e in range(E)]
    x = torch.cat([torch.randn(n, D) + 1.5 * torch.randn(D) for n in sizes])
    label = torch.cat([torch.full((n,), e) for e, n in enumerate(sizes)])
    return x, torch.randint(1, 4, (len(x),)).float(), label


def observed(x: torch.Tensor, weight: torch.Tensor, label: torch.Tensor, experts: int = E) -> Statistics:
    """Inputs of each weight in a run of their own."""
    statistics = Statistics.zeros(1, experts, D)
    for e in range(experts):
        mine = label == e
        for w in weight.unique().tolist():
            statistics.add(0, e, x[mine & (weight == w)], w / float(weight[mine].sum()))
    return statistics


@pytest.mark.parametrize("strength", [1e-6, 0.01, 1.0])
def test_ridge_is_least_squares(strength: float) -> None:
    """numpy's lstsq on weighted rows, one-hot targets, and D more rows for the ridge."""
    x, weight, label = clouds()
    mass = torch.zeros(E).index_add_(0, label, weight)
    root = (weight / mass[label]).sqrt().double().numpy()[:, None]
    rows, targets = root * x.double().numpy(), root * np.eye(E)[label.numpy()]
    penalty = strength * (rows**2).sum() / D
    system = np.concatenate([rows, np.sqrt(penalty) * np.eye(D)])
    solution, *_ = np.linalg.lstsq(system, np.concatenate([targets, np.zeros((D, E))]), rcond=None)
    found = router.ridge(observed(x, weight, label), 0, strength=strength, temperature=0.5)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), solution.T / 0.5, rtol=2e-4, atol=2e-5)


def test_statistics_add_up_and_move() -> None:
    x, weight, label = clouds()
    whole = observed(x, weight, label)
    mine = label == 1
    for w in (1.0, 2.0, 3.0):
        whole.add(0, 1, x[mine & (weight == w)], -w / float(weight[mine].sum()))
    torch.testing.assert_close(whole.means[0, 1], torch.zeros(D), rtol=0, atol=1e-5)
    left = whole.moved([0, 2, 3])
    rest, shifted = ~mine, torch.where(label > 1, label - 1, label)
    expected = observed(x[rest], weight[rest], shifted[rest], E - 1)
    torch.testing.assert_close(left.grams, expected.grams, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.means, expected.means)
    back = left.moved([0, None, 1, 2])
    assert back.means.shape == (1, E, D)
    assert not back.means[:, 1].any()
    assert torch.equal(back.means[:, 2], left.means[:, 1])


def test_grams_there_and_back() -> None:
    x = torch.randn(3, 20, D)
    grams = x.mT @ x
    torch.testing.assert_close(unpack(pack(grams), D), grams)
    assert pack(grams).shape == (3, D * (D + 1) // 2)


def balanced(weight: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    mass = torch.zeros(E).index_add_(0, label, weight)
    return (weight / mass[label] / E).double()


def slope_by_autograd(
    found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, label: torch.Tensor, strength: float
) -> torch.Tensor:
    """The gradient of the weighted, balanced, penalised cross-entropy, in float64."""
    share, w = balanced(weight, label), found.double().requires_grad_()
    penalty = strength * (share[:, None] * x.double().square()).sum() / D
    losses = torch.nn.functional.cross_entropy(x.double() @ w.T, label, reduction="none")
    ((share * losses).sum() + penalty * w.square().sum()).backward()
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("strength", [0.001, 0.01, 1.0])
def test_logistic_is_at_its_optimum(strength: float) -> None:
    x, weight, label = clouds()
    found = router.logistic(x, weight, label, strength=strength, temperature=0.5, steps=100)
    slope = slope_by_autograd(found * 0.5, x, weight, label, strength)
    start = slope_by_autograd(torch.zeros(E, D), x, weight, label, strength)
    assert slope.norm() < 1e-3 * start.norm()


def test_logistic_comes_near_in_its_few_steps() -> None:
    """As it is used, on inputs of different scales: most of the way from the ridge router to the optimum."""
    x, weight, label = clouds()
    x = x * torch.logspace(-0.5, 0.5, D)
    share = balanced(weight, label)
    penalty = 0.001 * float((share[:, None] * x.square()).sum()) / D

    def cost(w: torch.Tensor) -> float:
        losses = torch.nn.functional.cross_entropy(x @ w.T, label, reduction="none")
        return float((share * losses).sum()) + penalty * float(w.square().sum())

    few, best = (
        cost(router.logistic(x, weight, label, strength=0.001, temperature=1.0, steps=n)) for n in (10, 200)
    )
    start = cost(router.ridge(observed(x, weight, label), 0, strength=0.01, temperature=0.15))
    assert best <= few < best + 0.1 * (start - best)


def test_logistic_in_blocks_and_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, label = clouds()
    whole = router.logistic(x.bfloat16().float(), weight, label, strength=0.01, temperature=1.0)
    monkeypatch.setattr(router, "BLOCK", 7)
    found = router.logistic(x.bfloat16(), weight, label, strength=0.01, temperature=1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, whole, rtol=0, atol=0.01 * float(whole.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grams_add_up_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    gram = torch.eye(40)
    add_gram(gram, x, 0.25)
    expected = torch.eye(40).double() + 0.25 * x.double().T @ x.double()
    torch.testing.assert_close(gram.double(), expected, rtol=2e-6, atol=1e-5)
    product = x.float().T @ x.float() / 3  # values that bfloat16 does not hold: nothing is rounded outside
    torch.testing.assert_close(
        (product @ product).double(), product.double() @ product.double(), rtol=1e-5, atol=0
    )


def test_logistic_keeps_a_row_for_each_expert() -> None:
    x, weight, label = clouds()
    assert router.logistic(x, weight, label, strength=0.01, temperature=1.0).shape == (E, D)


def test_an_expert_is_favoured_in_the_mean() -> None:
    x, weight = torch.randn(50, D) + 0.5, torch.randn(E, D)
    before = x @ weight.T
    router.favour(weight, 1, x.bfloat16(), 2.5)
    gained = x @ weight.T - before
    assert gained.mean(0)[1].item() == pytest.approx(2.5, rel=1e-2)
    assert gained[:, [e for e in range(E) if e != 1]].abs().max() == 0


def test_an_expert_is_favoured_on_its_inputs_and_not_on_others() -> None:
    """Beside numpy's least squares: 1 on the favoured rows, 0 on all others, ridge rows below them."""
    x, weight, label = clouds()
    mine, share = label == 2, balanced(weight, label)
    found, plain = (
        router.logistic(x, weight, label, strength=0.01, temperature=1.0, favoured=favoured)
        for favoured in (router.Favoured(0, x[mine], 3.0), None)
    )
    root = share.sqrt().numpy()[:, None]
    penalty = router.WARM_STRENGTH * float((share[:, None] * x.double().square()).sum()) / D
    rows = np.concatenate([root * x.double().numpy(), np.sqrt(penalty) * np.eye(D)])
    target = (
        share.sqrt() * (mine / share)
    ).numpy()  # every favoured row counts alike, as in their plain mean
    along, *_ = np.linalg.lstsq(rows, np.concatenate([target, np.zeros(D)]), rcond=None)
    gained = (x @ (found - plain).T)[:, 0]
    expected = x.double().numpy() @ along
    np.testing.assert_allclose(gained, 3 * expected / expected[mine.numpy()].mean(), rtol=1e-3, atol=1e-3)
    assert gained[mine].mean().item() == pytest.approx(3.0, rel=1e-3)
    assert gained[~mine].abs().mean() < 1.0
    assert torch.equal(found[1:], plain[1:])


def test_prompts_by_hand() -> None:
    means = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0])]
    negative = [None, torch.tensor([0.0, -1.0]), None]
    found = router.prompts(means, negative, temperature=0.5)
    directions = torch.tensor([[2.0, -2.0], [0.0, 2.0], [-1.0, 2.5]])
    expected = directions / directions.square().sum(1, keepdim=True) / 0.5
    torch.testing.assert_close(found, expected)
    gap = found[1] @ (means[1] - torch.tensor([0.0, -1.0]))
    assert gap == pytest.approx(1 / 0.5)


def test_prompts_that_say_the_same_stay_finite() -> None:
    same = torch.ones(D)
    assert router.prompts([same, same], [None, None], temperature=0.2).isfinite().all()


def test_random_repeats_itself() -> None:
    first = router.random(8, 256, seed=1, layer=0)
    assert torch.equal(first, router.random(8, 256, seed=1, layer=0))
    assert not torch.equal(first, router.random(8, 256, seed=2, layer=0))
    assert not torch.equal(first, router.random(8, 256, seed=1, layer=1))
    assert float(first.std()) == pytest.approx(1 / 16, rel=0.1)
