"""GPTQ beside its definition: after each input, what is left is the best answer to the errors made so far."""

import pytest
import torch

from octad.fast import gptq
from octad.fast.gptq import inverse_factor, round_for
from octad.kernels.packed import SOUGHT, dequantize, quantize


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def inputs(rows: int, width: int) -> torch.Tensor:
    """Correlated, of different sizes."""
    return torch.randn(rows, width) @ torch.randn(width, width) * torch.logspace(-1, 1, width)


def best_scales(block: torch.Tensor, left_over: torch.Tensor, bits: int) -> torch.Tensor:
    """By brute force. An error of one input costs its square / `left_over`, the first value of the inverse of the Hessian
    of the inputs from it on: those behind it help as they can."""
    if bits == 8:
        return quantize(block.float(), bits, block.shape[1])[1]
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    costs, scales = [], []
    for shrink in SOUGHT:
        step = (largest.float() / -8 * shrink).bfloat16().double()
        q = (block / step).round().clamp(-8, 7)
        costs.append(((q * step - block).square() / left_over).sum(1))
        scales.append(step)
    return torch.stack(scales)[torch.stack(costs).argmin(0), torch.arange(len(block))].bfloat16()


def by_definition(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Column by column in float64, the heaviest first: round one, then move the others to where the squared error is
    least, which is a linear system over them (no inverse of the whole, no Cholesky factor)."""
    damped = hessian.double() + gptq.DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    left, zero = weight.double().clone(), 1 << (bits - 1)
    raw, scales = torch.empty(weight.shape, dtype=torch.uint8), []
    for k in range(weight.shape[1]):
        if k % group == 0:
            behind = [damped[i:, i:].inverse()[0, 0] for i in range(k, k + group)]
            scales.append(best_scales(left[:, k : k + group], torch.stack(behind), bits))
        step = scales[-1][:, 0].double()
        q = (left[:, k] / step).round().clamp(-zero if bits == 4 else 1 - zero, zero - 1)
        raw[:, k] = (q + zero).to(torch.uint8)
        error = left[:, k] - q * step
        rest = slice(k + 1, None)
        left[:, rest] += error[:, None] * torch.linalg.solve(damped[rest, rest], damped[rest, k])
    return raw, torch.cat(scales, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_what_its_definition_says(bits: int) -> None:
    weight, x = torch.randn(24, 48), inputs(96, 48)
    x = x[:, gptq.heaviest_first(x.square().sum(0), 16)]
    raw, scales = round_for(weight, x.T @ x, bits, 16)
    expected, expected_scales = by_definition(weight, x.T @ x, bits, 16)
    assert raw.shape == (24, 48)
    assert scales.dtype == torch.bfloat16
    # what lies within float32's error of the middle between two steps may fall to either side
    assert (raw != expected).double().mean() < (0.02 if bits == 4 else 0.1)
    assert (scales != expected_scales).double().mean() < 0.05
    assert (raw.int() - expected.int()).abs().max() <= (2 if bits == 4 else 20)


@pytest.mark.parametrize("rows", [20, 200])
def test_what_the_inputs_become_changes_less(rows: int) -> None:
    weight, x = torch.randn(40, 64), inputs(rows, 64)
    ours = dequantize(*round_for(weight, x.T @ x, 4, 32), 4)
    nearest = dequantize(*quantize(weight, 4, 32), 4)
    off, off_nearest = ((x @ (w - weight).T).square().sum() for w in (ours, nearest))
    assert off < 0.6 * off_nearest


def test_the_order_keeps_groups_together() -> None:
    sizes = torch.tensor([1.0, 2.0, 9.0, 0.0, 5.0, 5.0])
    assert gptq.heaviest_first(sizes, 2).tolist() == [4, 5, 2, 3, 1, 0]


@pytest.mark.parametrize("sizes", [torch.zeros(64), torch.rand(64) + 0.1])
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest(
    sizes: torch.Tensor,
) -> None:
    weight = torch.randn(8, 64)
    raw, scales = round_for(weight, torch.diag(sizes), 4, 32)
    step = scales.float().repeat_interleave(32, 1)
    assert torch.equal(raw, (weight / step).round().clamp(-8, 7).add(8).to(torch.uint8))
    cost = sizes if sizes.any() else torch.ones(64)
    off, off_four = (
        ((dequantize(*found, 4) - weight).square() * cost).view(8, 2, 32).sum(2)
        for found in ((raw, scales), quantize(weight, 4, 32))
    )
    assert (off <= off_four * (1 + 1e-5)).all()


def test_the_factor_is_of_the_damped_inverse() -> None:
    x = inputs(30, 16)
    hessian = x.T @ x
    hessian[3] = hessian[:, 3] = 0  # an input that is always zero
    factor = inverse_factor(hessian).double()
    seen = torch.arange(16) != 3
    damping = gptq.DAMPING * hessian.diagonal()[seen].mean()
    damped = hessian + torch.diag(torch.where(seen, 0.0, 1.0)) + damping * torch.eye(16)
    torch.testing.assert_close(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ damped.double(), torch.eye(16).double(), atol=1e-3, rtol=0)
