"""Native rounding and packing against their slow twin, to the bit, on every instruction set that runs here."""

from collections.abc import Iterator

import pytest
import torch
from kernel_builds import emulations, library_of

from octad.kernels import packing
from octad.kernels.compile import BuildError, runnable
from octad.kernels.packed import pack, pack_raw, quantize, round_in_turn
from octad.kernels.packing import quick_pack, quick_pack_raw, quick_quantize, quick_round_in_turn

SHAPES = [(1, 8), (16, 64), (17, 72), (33, 96), (5, 200), (48, 320)]  # odd and even numbers of groups
BITS = [32, 16, 8, 4]


@pytest.fixture(autouse=True, params=[*runnable(), *emulations()[1:]])
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = packing._Packing(library_of(request.param))
    monkeypatch.setattr(packing, "_packing", lambda: made)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def weight(outputs: int, inputs: int) -> torch.Tensor:
    """Rows from 1e-40 to 1e30, with zeros, minus zeros, ties of magnitude and an outlier."""
    draw = torch.Generator().manual_seed(outputs)
    w = torch.randn(outputs, inputs, generator=draw) * torch.logspace(-40, 30, outputs)[:, None]
    w[outputs // 2] = torch.tensor([0.0, -0.0]).repeat(inputs // 2)
    w[0, inputs // 2] *= 50
    w[-1, :4] = torch.tensor([4.0, -4.0, 0.5, 1.5]) * w[-1].abs().max()
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_panels_are_the_twins(bits: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for group in (None,) if bits > 8 else (None, 8, 24):
            w = weight(*shape).clamp(-6e4, 6e4).to(dtype)
            found, twin = quick_pack(w, bits, group), pack(w, bits, group)
            assert torch.equal(found.panels, twin.panels), (shape, group)
            assert (found.outputs, found.inputs, found.bits, found.group) == (*shape, bits, twin.group)


@pytest.mark.parametrize("bits", BITS)
def test_rows_may_lie_apart_and_panels_too(bits: int) -> None:
    both = weight(34, 96)
    twin = pack(both[::2, 8:88], bits)
    room = torch.zeros(len(twin.panels), 2, twin.panels.shape[1], dtype=torch.uint8)
    found = quick_pack(both[::2, 8:88], bits, empty=lambda shape: room[:, 1], wide=True)
    assert torch.equal(found.panels, twin.panels)
    assert not room[:, 0].any()
    assert found.panels.data_ptr() == room[:, 1].data_ptr()
    assert found.wide == (bits == 16)
    assert torch.equal(quick_pack(both.T, bits).panels, pack(both.T, bits).panels)


@pytest.mark.parametrize("group", [8, 32, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_and_scales_are_the_twins(bits: int, group: int) -> None:
    for outputs, groups in ((1, 1), (17, 3), (48, 4)):
        w = weight(outputs, groups * group)
        (raw, scales), (twin, twin_scales) = quick_quantize(w, bits, group), quantize(w, bits, group)
        assert torch.equal(raw, twin)
        assert torch.equal(scales.view(torch.int16), twin_scales.view(torch.int16))
        inputs = groups * group - 3
        packed = quick_pack_raw(raw, scales, bits, inputs)
        assert torch.equal(packed.panels, pack_raw(raw, scales, bits, inputs).panels)
        assert (packed.outputs, packed.inputs, packed.group) == (outputs, inputs, group)


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_rounded_in_turn_are_the_twins(bits: int) -> None:
    """But for what lies in the middle between two steps, since sums come in another order."""
    draw = torch.Generator().manual_seed(0)
    for outputs, group in ((1, 8), (64, 32), (150, 24)):
        x = torch.randn(group, outputs, generator=draw)
        x[:, 0] = 0
        factor = (torch.randn(group, group, generator=draw) * 0.1).triu(1) + torch.diag(
            torch.logspace(-1, 1, group)
        )
        left, twin_left = x.clone(), x.clone()
        found, twin = quick_round_in_turn(left, factor, bits), round_in_turn(twin_left, factor, bits)
        for ours, theirs in zip(found, twin, strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
        same = (found[1] == twin[1]) & (found[0] == twin[0]).all(0)
        assert same.double().mean() > 0.9
        torch.testing.assert_close(left[:, same], twin_left[:, same], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[2][:, same], twin[2][:, same], rtol=1e-4, atol=1e-4)


def test_scales_by_cost_are_the_twins() -> None:
    """But for two scales that cost the same, since sums come in another order."""
    for shape in SHAPES:
        w = weight(*shape)
        cost = torch.logspace(-2, 2, shape[1])[
            torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))
        ]
        for group in (None, 8, 24):
            found, twin = quick_pack(w, 4, group, cost_K=cost), pack(w, 4, group, cost_K=cost)
            (raw, scales), (twin_raw, twin_scales) = found.raw(), twin.raw()
            same = scales == twin_scales
            assert same.double().mean() > 0.98
            assert torch.equal(raw.view(*scales.shape, -1)[same], twin_raw.view(*scales.shape, -1)[same])
            assert torch.equal(quick_pack(w, 8, group, cost_K=cost).panels, quick_pack(w, 8, group).panels)


def test_dear_inputs_lose_less_than_to_the_nearest() -> None:
    """By hand: of the eight scales each group has the one that costs least, in float64."""
    draw = torch.Generator().manual_seed(0)
    w, cost = torch.randn(32, 64, generator=draw), torch.rand(64, generator=draw) ** 8
    found = quick_pack(w, 4, cost_K=cost).unpack(torch.float64)
    blocks, costs = w.double().view(32, 2, 32), cost.double().view(2, 32)
    ends = blocks.gather(2, blocks.abs().argmax(2, keepdim=True)) / -8
    tried = []
    for part in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05):
        scale = (ends * part).bfloat16().double()
        tried.append(((blocks / scale).round().clamp(-8, 7) * scale - blocks).square().mul(costs).sum(2))
    lost = (found.view(32, 2, 32) - blocks).square().mul(costs).sum(2)
    torch.testing.assert_close(lost, torch.stack(tried).amin(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_is_left_to_the_twin(bits: int, odd: float) -> None:
    w = weight(17, 72)
    w[3, 70] = odd
    assert torch.equal(quick_pack(w, bits).panels, pack(w, bits).panels)
    padded = w[:, :64]
    padded[16, 63] = odd
    assert torch.equal(quick_quantize(padded, bits, 32)[0], quantize(padded, bits, 32)[0])


def test_without_a_compiler_the_twin_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BuildError("no compiler")

    monkeypatch.undo()
    packing._packing.cache_clear()
    monkeypatch.setattr(packing, "load", refuse)
    w = weight(17, 64)
    try:
        assert torch.equal(quick_pack(w, 4).panels, pack(w, 4).panels)
        raw, scales = quick_quantize(w, 8, 64)
        assert torch.equal(raw, quantize(w, 8, 64)[0])
        assert torch.equal(quick_pack_raw(raw, scales, 8, 64).panels, pack(w, 8).panels)
    finally:
        packing._packing.cache_clear()
