"""The passes between products, native against their twins, and the twins against autograd."""

import pytest
import torch
import torch.nn.functional as F
from kernel_builds import emulations, library_of

from octad.kernels import passes
from octad.kernels.attention import causal_mask
from octad.kernels.compile import BuildError, runnable
from octad.kernels.passes import NativePasses, Passes, not_native, quick_passes
from octad.model.rope import rotated

CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 0.02, "atol": 0.004}}


@pytest.fixture(params=["twin", *runnable(), *emulations()[1:]])
def mine(request: pytest.FixtureRequest) -> Passes:
    if request.param == "twin":
        return Passes()
    try:
        return NativePasses(library_of(request.param))
    except BuildError as error:
        if "no C compiler found" not in str(error):  # with a compiler they have to be built
            raise
        pytest.skip(str(error))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("strided", [False, True])
def test_swiglu(mine: Passes, dtype: torch.dtype, strided: bool) -> None:
    """Also where gate and up are halves of one matrix; rows of no round length."""
    hidden = (3 * torch.randn(9, 74)).to(dtype)
    gate, up = hidden.chunk(2, -1) if strided else (hidden[:, :37].contiguous(), hidden[:, 37:].contiguous())
    dh = torch.randn(9, 37).to(dtype)
    exact = [t.float().clone().requires_grad_() for t in (gate, up)]
    h = F.silu(exact[0]) * exact[1]
    expected = torch.autograd.grad(h, exact, dh.float())
    torch.testing.assert_close(mine.swiglu(gate, up).float(), h.detach(), **CLOSE[dtype])
    dgate, dup = torch.empty_like(hidden).chunk(2, -1) if strided else (torch.empty_like(dh) for _ in "12")
    again = mine.swiglu_backward(dh, gate, up, dgate, dup)
    torch.testing.assert_close(again.float(), h.detach(), **CLOSE[dtype])
    for found, true in zip((dgate, dup), expected, strict=True):
        torch.testing.assert_close(found.float(), true, **CLOSE[dtype])


@pytest.mark.parametrize("window", [None, 3])
def test_causal_softmax(mine: Passes, dtype: torch.dtype, window: int | None) -> None:
    """Two heads of five queries, the last of 21 positions."""
    scores, dp = (torch.randn(3, 10, 21).to(dtype) for _ in range(2))
    exact = scores.float().clone().requires_grad_()
    seen = causal_mask(5, 21, window).repeat(2, 1)
    p = (0.5 * exact).masked_fill(~seen, float("-inf")).softmax(-1)
    (expected,) = torch.autograd.grad(p, [exact], dp.float())
    found = mine.causal_softmax_(scores.clone(), 5, window, 0.5)
    torch.testing.assert_close(found.float(), p.detach(), **CLOSE[dtype])
    ds = mine.softmax_backward_(found, dp.clone(), 5, window, 0.5)
    torch.testing.assert_close(ds.float(), expected, **CLOSE[dtype])


def test_cross_entropy(mine: Passes, dtype: torch.dtype) -> None:
    logits, targets = (4 * torch.randn(7, 101)).to(dtype), torch.randint(0, 101, (7,))
    targets[[2, 5]] = -100
    exact = logits.float().clone().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), [exact])
    losses = mine.cross_entropy_(logits, targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.float(), gradient, **CLOSE[dtype])
    with pytest.raises((IndexError, RuntimeError)):
        mine.cross_entropy_(logits, targets + 101)


def test_double_precision_goes_through_the_twin() -> None:
    gate, up = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(quick_passes().swiglu(gate, up), F.silu(gate) * up, rtol=1e-12, atol=1e-12)


def test_without_a_compiler_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options: object) -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(passes, "load", broken)
    passes._built.cache_clear()
    try:
        assert type(quick_passes()) is Passes
        assert not_native() == "no compiler"
    finally:
        passes._built.cache_clear()


@pytest.mark.parametrize("summed", [True, False])
def test_add_norm(mine: Passes, dtype: torch.dtype, summed: bool) -> None:
    """Against PyTorch's norm, with the gradient of the sum itself or without."""
    x, delta, dh, dy = (torch.randn(9, 37).to(dtype) for _ in range(4))
    weight = torch.randn(37).to(dtype)
    exact = [t.float().clone().requires_grad_() for t in (x, delta, weight)]
    h = exact[0] + exact[1] if summed else exact[0] + 0
    y = F.rms_norm(h, (37,), exact[2], 1e-5)
    found_h, found_y, inverse = mine.add_norm(x, delta if summed else None, weight, 1e-5)
    torch.testing.assert_close(found_h.float(), h.detach(), **CLOSE[dtype])
    torch.testing.assert_close(
        found_y.float(), y.detach(), rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2
    )
    outer = dh.float() if summed else torch.zeros(9, 37)
    dx, _, dweight = torch.autograd.grad((h, y), exact, (outer, dy.float()), allow_unused=True)
    mine_x, mine_weight = mine.add_norm_backward(
        found_h, weight, inverse, dh if summed else None, dy, want_weight=True
    )
    size = {"rtol": 0.02, "atol": 0.03} if dtype == torch.bfloat16 else CLOSE[dtype]
    torch.testing.assert_close(mine_x.float(), dx, **size)
    torch.testing.assert_close(mine_weight.float(), dweight, **size)
    assert mine.add_norm_backward(found_h, weight, inverse, None, dy, want_weight=False)[1] is None


def test_rotation(mine: Passes, dtype: torch.dtype) -> None:
    """The model's own rotation, and the way back to where it began."""
    x, angles = torch.randn(2, 5, 3, 8).to(dtype), torch.randn(5, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    there = mine.rotate(x, cos, sin, 1.0)
    torch.testing.assert_close(there, rotated(x, cos[:, None], sin[:, None]), **CLOSE[dtype])
    torch.testing.assert_close(mine.rotate(there, cos, sin, -1.0), x, rtol=0.02, atol=0.02)
