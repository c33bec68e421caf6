"""The shared part: against peft's merging functions, and algebra by hand."""

import zlib
from collections.abc import Callable

import pytest
import torch
from peft.utils import merge_utils

from octad.combine.recipe import SharedSpec
from octad.combine.shared import METHODS, trim

SHAPES = [(40,), (12, 30)]


def tensors(shape: tuple[int, ...], count: int = 4) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(len(shape))
    base = torch.randn(shape)
    return base, [base + torch.randn(shape) * 0.1 for _ in range(count)]


def merge(
    method: str, base: torch.Tensor, members: list[torch.Tensor], weights: list[float], **spec: float
) -> torch.Tensor:
    return METHODS[method](base, members, weights, spec=SharedSpec(method=method, **spec), name="some.weight")


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_is_pefts(shape: tuple[int, ...], density: float) -> None:
    base, members = tensors(shape)
    expected = base + merge_utils.ties([m - base for m in members], torch.ones(4), density)
    found = merge("ties", base, members, [0.25] * 4, density=density)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ties_by_hand() -> None:
    """Trim to two of four; elect by weight; average those that agree, by weight."""
    base = torch.zeros(4)
    members = [torch.tensor([1.0, -4.0, 0.1, 3.0]), torch.tensor([2.0, 8.0, 0.2, -0.3])]
    found = merge("ties", base, members, [0.75, 0.25], density=0.5)
    # trimmed: [0, -4, 0, 3] and [2, 8, 0, 0]; weighted sums of column 1: -3 + 2 < 0, so -4 wins alone
    torch.testing.assert_close(found, torch.tensor([2.0, -4.0, 0.0, 3.0]))
    scaled = merge("ties", base, members, [0.75, 0.25], density=0.5, scale=0.5)
    torch.testing.assert_close(scaled, found / 2)
    both = merge("ties", base, [torch.tensor([1.0]), torch.tensor([4.0])], [0.75, 0.25], density=1.0)
    torch.testing.assert_close(both[:1], torch.tensor([1.75]))


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_dare_is_pefts_for_the_same_draw(
    shape: tuple[int, ...], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, members = tensors(shape)
    places = iter(range(len(members)))

    def draw(probability: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"0/{next(places)}/some.weight".encode()))
        return (torch.rand(probability.shape, generator=generator) < density).to(probability)

    weights = [0.4, 0.3, 0.2, 0.1]
    found = merge("dare", base, members, weights, density=density)
    monkeypatch.setattr(torch, "bernoulli", draw)
    expected = base + merge_utils.dare_linear([m - base for m in members], torch.tensor(weights), density)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dare_repeats_itself_and_is_right_on_average() -> None:
    base, members = tensors((12, 30))
    assert torch.equal(merge("dare", base, members, [0.25] * 4), merge("dare", base, members, [0.25] * 4))
    draws = torch.stack([merge("dare", base, members, [0.25] * 4, seed=s) for s in range(400)])
    torch.testing.assert_close(draws.mean(0), merge("linear", base, members, [0.25] * 4), rtol=0, atol=0.02)


def test_trim_keeps_the_largest() -> None:
    delta = torch.tensor([[0.1, -3.0], [2.0, -0.2]])
    assert trim(delta, 0.5).tolist() == [[0.0, -3.0], [2.0, 0.0]]
    assert int((trim(delta, 0.01) != 0).sum()) == 1
    assert torch.equal(trim(delta, 1.0), delta)


def test_base_linear_and_mean_by_hand() -> None:
    base, members = tensors((12, 30), 2)
    weights = [0.75, 0.25]
    assert torch.equal(merge("base", base, [], weights), base)
    torch.testing.assert_close(merge("linear", base, members, weights), 0.75 * members[0] + 0.25 * members[1])
    torch.testing.assert_close(merge("mean", base, members, weights), (members[0] + members[1]) / 2)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_members_that_changed_nothing_give_the_base(method: str) -> None:
    base = torch.randn(8, 8, dtype=torch.bfloat16)
    found = merge(method, base, [base.clone() for _ in range(4)], [0.25] * 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, base.float())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_inputs_are_left_alone(method: str) -> None:
    base, members = tensors((12, 30))
    before: Callable[[], list[torch.Tensor]] = lambda: [t.clone() for t in (base, *members)]  # noqa: E731
    saved = before()
    merge(method, base, members, [0.25] * 4).add_(1)
    assert all(torch.equal(a, b) for a, b in zip(saved[1:], members, strict=True))
