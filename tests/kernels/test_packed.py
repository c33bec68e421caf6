"""Packed weights: exact where they promise it, and error bounds by algebra elsewhere."""

import pytest
import torch

from octad.kernels import packed
from octad.kernels.packed import PANEL, Packed, dequantize, linear, linear_reference, pack, pack_raw, quantize

SHAPES = [
    (1, 8),
    (16, 64),
    (17, 72),
    (33, 96),
    (5, 200),
    (48, 320),
    (64, 192),
]  # odd and even numbers of groups


def weight(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, with an all-zero row and an outlier."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=draw) * torch.logspace(-3, 2, outputs)[:, None]
    w[outputs // 2] = 0
    w[0, inputs // 2] *= 50
    return w


@pytest.mark.parametrize("group", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_and_scales_come_back(shape: tuple[int, int], bits: int, group: int) -> None:
    outputs, inputs = shape
    groups = -(-inputs // group)
    raw = torch.randint(0, 1 << bits, (outputs, groups * group), dtype=torch.uint8)
    scales = torch.randn(outputs, groups).bfloat16()
    w = pack_raw(raw, scales, bits, inputs)
    found, found_scales = w.raw()
    assert torch.equal(found[:outputs], raw)
    assert torch.equal(found_scales[:outputs], scales)
    by_hand = (raw.double() - 2 ** (bits - 1)) * scales.double().repeat_interleave(group, 1)
    assert torch.equal(w.unpack(torch.float64), by_hand[:, :inputs])
    assert torch.equal(dequantize(raw, scales, bits).double(), by_hand)
    assert w.nbytes == -(-outputs // PANEL) * (
        groups * group * PANEL * bits // 8 + -(-groups // 2) * 4 * PANEL
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_the_layout_is_what_native_c_reads(bits: int) -> None:
    """One value of a panel, byte by byte as the comment in panels.h says."""
    raw = torch.full((16, 3 * 16), 1 << (bits - 1), dtype=torch.uint8)
    raw[5, 16 + 14] = 3  # output 5, second group, input 14 of it
    w = pack_raw(raw, torch.ones(16, 3).bfloat16(), bits, 48)
    panel = w.panels[0].tolist()
    assert len(w.panels[0]) == 2 * 64 + 3 * 16 * 16 * bits // 8
    group_bytes = 16 * 16 * bits // 8
    if bits == 8:
        place = 64 + group_bytes + 14 // 4 * 64 + 5 * 4 + 14 % 4
        assert panel[place] == 3
    else:  # inputs 12..15 of a group are the high halves of the second 64 bytes
        place = 64 + group_bytes + 14 // 8 * 64 + 5 * 4 + 14 % 4
        assert panel[place] == 3 << 4 | 8
    assert w.panels[0, :64].view(torch.bfloat16).tolist() == [1.0] * 32


@pytest.mark.parametrize("shape", SHAPES)
def test_16_bits_are_bfloat16(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    assert torch.equal(pack(w.bfloat16(), 16).unpack(), w.bfloat16().float())
    assert torch.equal(pack(w, 32).unpack(), w)
    x = torch.randn(3, shape[1], dtype=torch.float64)  # as the reference sums
    torch.testing.assert_close(
        linear_reference(x, pack(w.bfloat16(), 16, wide=True)), x @ w.bfloat16().double().T
    )
    torch.testing.assert_close(linear_reference(x, pack(w, 32)), x @ w.double().T)
    assert torch.equal(pack(w, 16).unpack(), w.bfloat16().float())


@pytest.mark.parametrize("shape", SHAPES)
def test_8_bits_are_within_half_a_step(shape: tuple[int, int]) -> None:
    """A step is the largest magnitude of the group / 127, rounded up to bfloat16, which is at most 2^-7 more."""
    w = weight(*shape)
    found = pack(w, 8)
    q, scales = found.integers()
    largest = torch.nn.functional.pad(w, (0, -w.shape[1] % 64)).view(len(w), -1, 64).abs().amax(-1)
    scales = scales[: len(w)]
    assert (scales.double() * 127 >= largest.double() * (1 - 1e-6)).all()
    assert (scales.double() <= largest.double() / 127 * (1 + 2**-7) + 1e-37).all()
    steps = scales.repeat_interleave(64, 1)[:, : w.shape[1]]
    assert ((found.unpack() - w).abs() <= 0.5 * steps * (1 + 1e-5)).all()
    assert q.abs().max() <= 127


@pytest.mark.parametrize("shape", SHAPES)
def test_4_bits_search_is_never_worse_than_rounding(shape: tuple[int, int]) -> None:
    """Rounding by hand: the largest magnitude on -8, whatever its sign, and everything to the nearest step."""
    w = torch.nn.functional.pad(weight(*shape), (0, -shape[1] % 32))
    blocks = w.view(len(w), -1, 32)
    at = blocks.abs().argmax(-1, keepdim=True)
    step = (blocks.gather(-1, at) / -8).bfloat16().float()
    plain = (blocks / torch.where(step == 0, 1.0, step)).round().clamp(-8, 7) * step
    ours = dequantize(*quantize(w, 4, 32), 4).view(blocks.shape)
    before, after = ((x - blocks).square().sum(-1) for x in (plain, ours))
    assert (after <= before * (1 + 1e-5)).all()
    if blocks[..., 0].numel() > 20:
        assert after.sum() < before.sum()  # and the search is there for something


def test_4_bits_take_the_best_of_their_scales() -> None:
    """Every scale tried by brute force, in float64."""
    w = weight(16, 64, seed=3)
    blocks = w.view(16, 2, 32).double()
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    errors = []
    for shrink in packed.SHRINK:
        step = (largest.float() / -8 * shrink).bfloat16().double()
        q = (blocks / torch.where(step == 0, 1.0, step)).round().clamp(-8, 7)
        errors.append((q * step - blocks).square().sum(-1))
    best = torch.stack(errors).amin(0)
    ours = (dequantize(*quantize(w, 4, 32), 4).view(blocks.shape).double() - blocks).square().sum(-1)
    torch.testing.assert_close(ours, best, rtol=1e-4, atol=1e-12)


def test_many_rows_are_as_each_alone() -> None:
    w = weight(2 * packed.ROWS + 5, 64)
    for bits, group in ((8, 64), (4, 32)):
        raw, scales = quantize(w, bits, group)
        for row in (0, packed.ROWS - 1, packed.ROWS, len(w) - 1):
            one, scale = quantize(w[row : row + 1], bits, group)
            assert torch.equal(raw[row], one[0])
            assert torch.equal(scales[row], scale[0])


def test_memory_may_come_from_elsewhere() -> None:
    given: list[torch.Tensor] = []

    def empty(shape: tuple[int, int]) -> torch.Tensor:
        given.append(torch.zeros(shape, dtype=torch.uint8))
        return given[-1]

    for bits in (16, 8, 4):
        w = pack(weight(20, 72), bits, empty=empty)
        assert w.panels.data_ptr() == given[-1].data_ptr()
        assert torch.equal(w.unpack(), pack(weight(20, 72), bits).unpack())


def test_linear_is_the_product_with_the_unpacked_weight() -> None:
    x = torch.randn(3, 72)
    for bits in (16, 8, 4):
        w = pack(weight(20, 72), bits)
        torch.testing.assert_close(linear(x, w), x @ w.unpack().T)
        wanted = (x.bfloat16().float() if bits == 16 else rounded(x, w)).double() @ w.unpack(torch.float64).T
        torch.testing.assert_close(linear_reference(x.double(), w), wanted, rtol=1e-5, atol=1e-4)


def rounded(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """Activations in 8 bits by group, one value after the other."""
    y = x.clone()
    for row in y:
        for start in range(0, len(row), w.group):
            part = row[start : start + w.group]
            scale = float(part.abs().max()) / 127
            part.copy_(torch.tensor([round(float(v) / scale) * scale for v in part]))
    return y
