"""Weights packed for the native kernels: floats, or 8 or 4 bit integers with a bfloat16 scale per `group` inputs.

    w = pack(weight_OK, bits=8)          # or 32, 16, 4; panels of 16 outputs, laid out as native.c reads them
    w = pack(weight_OK, 4, cost_K=cost)  # scales by what an error in each input costs
    w = pack(weight_OK, 16, wide=True)   # bfloat16 weights that multiply float32 activations
    w.unpack()                           # weight_OK again, rounded
    linear(x_NK, w)                      # PyTorch: unpacked on the fly, any device
    linear_reference(x_NK, w)            # the slow twin of the native kernels: activations in 8 bits too

A quantised value is integer x scale. 8 bits are symmetric (-127..127). At 4 bits (-8..7) the scale carries the sign that
puts the value of largest magnitude on -8, and of a few scales around it the one with the least squared error is kept.
Integers are kept "raw", with 2^(bits-1) added, so that they are unsigned: in panels and on disk.

Shapes: N tokens, O outputs, K inputs, P panels (O/16, rounded up), G groups of inputs; K' is K padded to whole groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from octad.kernels.panels import GROUPS, PANEL

FLOATS = {32: torch.float32, 16: torch.bfloat16}
SHRINK = (
    1.0,
    0.95,
    0.9,
    0.85,
)  # scales tried at 4 bits, as parts of the one that just holds the largest value
DEAR = (1.0, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # the same where inputs have costs
SMALLEST = 1e-30  # activations that are all below it count as zero: 127 divided by them would not be finite
SOUGHT = tuple(1.05 - 0.025 * n for n in range(16))  # the same where an error's cost is known
ROWS = 256  # rows of a weight that are quantised at a time: what is in between stays in the processor's cache

Empty = Callable[[tuple[int, int]], torch.Tensor]  # makes the memory of panels [P, bytes], uint8


@dataclass(frozen=True)
class Packed:
    """A weight [O, K] as panels uint8 [P, bytes], in native.c's layout. Panels need not follow each other directly: gate
    and up projections lie alternately. `wide`: bfloat16 weights whose products are float32's, with activations as they
    are, where otherwise these are rounded to bfloat16."""

    panels: torch.Tensor
    outputs: int
    inputs: int
    bits: int
    group: int
    wide: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.panels.numel()

    def integers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The signed integers int8 [16 P, K'] and the scales float32 [16 P, G] of a quantised weight."""
        raw, scales = self.raw()
        return (raw.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8), scales.float()

    def raw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The unsigned integers uint8 [16 P, K'] and the scales bfloat16 [16 P, G] of a quantised weight."""
        P, G = len(self.panels), -(-self.inputs // self.group)
        blocks = self._blocks(G)
        scales = blocks[:, :, : 4 * PANEL].contiguous().view(torch.bfloat16).view(P, -1, PANEL)[:, :G]
        raw = blocks[:, :, 4 * PANEL :].reshape(P, -1, PANEL, 4)
        if self.bits == 4:  # a byte holds inputs k (low) and k + 4 (high)
            raw = torch.stack((raw & 15, raw >> 4), dim=2).flatten(1, 2)
        raw = raw[:, : G * self.group // 4].transpose(1, 2).reshape(P * PANEL, -1)
        return raw, scales.transpose(1, 2).reshape(P * PANEL, G)

    def _blocks(self, groups: int) -> torch.Tensor:
        """[P, pairs of groups, bytes]; an odd last group is filled up."""
        block, pairs = _block_bytes(self.bits, self.group), -(-groups // 2)
        padded = F.pad(self.panels, (0, pairs * block - self.panels.shape[1]))
        return padded.view(len(self.panels), pairs, block)

    def unpack(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """weight [O, K], each value exactly integer x scale before the cast to `dtype`."""
        if self.bits == 32:
            weight = self.panels.contiguous().view(torch.float32).view(len(self.panels), -1, PANEL)
            weight = weight.transpose(1, 2).reshape(len(self.panels) * PANEL, -1)
        elif self.bits == 16:
            pairs = self.panels.contiguous().view(torch.bfloat16).view(len(self.panels), -1, PANEL, 2)
            weight = pairs.transpose(1, 2).reshape(len(self.panels) * PANEL, -1)
        else:
            weight = dequantize(*self.raw(), self.bits)
        return weight[: self.outputs, : self.inputs].to(dtype)


class Placed(Packed):
    """A Packed whose panels lie where the kernels shall read them: nobody copies them."""


def pack(
    weight_OK: torch.Tensor,
    bits: int,
    group: int | None = None,
    empty: Empty | None = None,
    *,
    wide: bool = False,
    cost_K: torch.Tensor | None = None,
) -> Packed:
    """Pack a weight at 32 (float32), 16 (bfloat16), 8 or 4 bits; `group` inputs (a multiple of 8) share a scale. `empty`
    makes the memory, for who wants it somewhere special. `wide` is for 16 bits, as in Packed. `cost_K`, for 4 bits: what
    an error in each input costs, as a factor of its square."""
    group = group or GROUPS[bits]
    outputs, inputs = weight_OK.shape
    if bits not in FLOATS:
        padded = F.pad(weight_OK, (0, -inputs % group))
        cost = None if cost_K is None else F.pad(cost_K.float(), (0, -inputs % group))
        return pack_raw(*quantize(padded, bits, group, cost), bits, inputs, empty)
    padded = F.pad(weight_OK.to(FLOATS[bits]), (0, -inputs % group, 0, -outputs % PANEL)).contiguous()
    # a value of float32, or two of bfloat16
    words_PKO = padded.view(torch.int32).view(len(padded) // PANEL, PANEL, -1).transpose(1, 2)
    panels = _empty(empty, weight_OK, len(padded) // PANEL, words_PKO[0].numel() * 4)
    panels.view(torch.int32).view(words_PKO.shape).copy_(words_PKO)
    return Packed(panels, outputs, inputs, bits, group, wide)


def pack_raw(
    raw_OK: torch.Tensor, scales_OG: torch.Tensor, bits: int, inputs: int, empty: Empty | None = None
) -> Packed:
    """Unsigned integers uint8 [O, K'] and scales bfloat16 [O, G] as panels; `inputs` are the K that count of K'."""
    outputs, G = scales_OG.shape
    group = raw_OK.shape[1] // G
    zero = 1 << (bits - 1)
    raw = F.pad(raw_OK, (0, G % 2 * group, 0, -outputs % PANEL), value=zero).contiguous()
    scales = F.pad(scales_OG.to(torch.bfloat16), (0, G % 2, 0, -outputs % PANEL))
    P, pairs = len(raw) // PANEL, (G + 1) // 2
    fours_PBIO = (
        raw.view(torch.int32).view(P, PANEL, pairs, -1).permute(0, 2, 3, 1)
    )  # four inputs are one value
    if bits == 4:
        fours_PBIO = fours_PBIO[:, :, 0::2] | (fours_PBIO[:, :, 1::2] << 4)
    half = group * PANEL * bits // 8  # bytes of one group's integers
    panels = _empty(empty, raw_OK, P, pairs * _block_bytes(bits, group))
    blocks = panels.view(P, pairs, -1)
    heads_PBGO = scales.view(P, PANEL, pairs, 2).permute(0, 2, 3, 1)
    blocks[:, :, : 4 * PANEL].view(torch.bfloat16).view(heads_PBGO.shape).copy_(heads_PBGO)
    blocks[:, :, 4 * PANEL :].view(torch.int32).view(fours_PBIO.shape).copy_(fours_PBIO)
    if not G % 2:
        return Packed(panels, outputs, inputs, bits, group)
    used = _empty(empty, raw_OK, P, panels.shape[1] - half)
    return Packed(used.copy_(panels[:, : panels.shape[1] - half]), outputs, inputs, bits, group)


def _block_bytes(bits: int, group: int) -> int:
    """Bytes of two groups: their scales, then their integers."""
    return 4 * PANEL + 2 * group * PANEL * bits // 8


def _empty(empty: Empty | None, like: torch.Tensor, panels: int, size: int) -> torch.Tensor:
    return empty((panels, size)) if empty else like.new_empty(panels, size, dtype=torch.uint8)


def quantize(
    weight_OK: torch.Tensor, bits: int, group: int, cost_K: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unsigned integers uint8 [O, K] and scales bfloat16 [O, G] of a weight whose K is a multiple of `group`."""
    round_ = _round8 if bits == 8 else _round4
    if cost_K is not None and bits == 4:
        round_ = partial(_round4_dear, cost_K.view(-1, group))
    raw = torch.empty(weight_OK.shape, dtype=torch.uint8, device=weight_OK.device)
    scales = raw.new_empty(len(raw), raw.shape[1] // group, dtype=torch.bfloat16)
    for start in range(0, len(raw), ROWS):
        some, to = weight_OK[start : start + ROWS], raw[start : start + ROWS]
        q, scales[start : start + ROWS] = round_(some.float().view(len(some), -1, group))
        to.copy_(q.to(torch.int8).view(to.shape).view(torch.uint8).add_(1 << (bits - 1)))  # modulo 256
    return raw, scales


def dequantize(raw_OK: torch.Tensor, scales_OG: torch.Tensor, bits: int) -> torch.Tensor:
    """What quantize rounded to, [O, K] in float32: exactly integer x scale."""
    q = raw_OK.view(*scales_OG.shape, -1).float().sub_(1 << (bits - 1))
    return q.mul_(scales_OG.float()[..., None]).view(raw_OK.shape)


def _round8(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [O, G, group] as floats, and scales bfloat16 [O, G]."""
    scales = _upward_bfloat16(torch.maximum(blocks.amax(-1), -blocks.amin(-1)).abs() / 127)
    return (blocks / scales.float().clamp_min(SMALLEST)[..., None]).round_(), scales


def _round4(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As _round8; of the scales of SHRINK, each block's best. A scale of zero has no sign."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    scale = (largest / -8).to(torch.bfloat16)
    error = _error4(blocks, scale)
    for shrink in SHRINK[1:]:
        scale2 = (largest / -8 * shrink).to(torch.bfloat16)
        error2 = _error4(blocks, scale2)
        better = error2 < error
        scale, error = torch.where(better, scale2, scale), torch.where(better, error2, error)
    scale = scale + 0.0
    return _nearest4(blocks, scale), scale.squeeze(-1)


def _round4_dear(cost_GK: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As _round4; of the scales of DEAR, that whose errors cost each block the least."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    full = torch.where(high > -low, high, low) / -8
    best, least = torch.empty_like(full), torch.empty_like(full, dtype=torch.float64)
    for shrink in DEAR:
        scale = (full * shrink).to(torch.bfloat16).float()
        step = torch.where(scale == 0, 1.0, scale)
        off = (blocks / step).round().clamp_(-8, 7).sub_(blocks / step)
        cost = (cost_GK * off.square_()).sum(-1, keepdim=True).double() * step.double().square()
        better = (cost < least) if shrink != DEAR[0] else torch.ones_like(cost, dtype=torch.bool)
        best, least = torch.where(better, scale, best), torch.where(better, cost, least)
    scale = best.to(torch.bfloat16) + 0.0
    return _nearest4(blocks, scale), scale.squeeze(-1)


def _nearest4(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    step = scale.float()
    return (blocks / torch.where(step == 0, 1.0, step)).round_().clamp_(-8, 7)


def _error4(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each block's squared distance from itself rounded to a scale: in float64 and in a fixed order, eight sums and then
    halves of them, so that the native twin finds the same best scale to the bit."""
    off = _nearest4(blocks, scale).mul_(scale.float()).sub_(blocks).double()
    sums, *others = off.square_().view(*off.shape[:-1], -1, 8).unbind(-2)
    for other in others:
        sums = sums + other
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums


def round_in_turn(
    left_GO: torch.Tensor, factor_GG: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One group's inputs [G, O] rounded one after the other. Each one's error is taken off those behind it, in place, by
    what the upper triangular factor says. Gives unsigned integers uint8 [G, O], scales bfloat16 [O], and errors [G, O],
    as multiples of their input's place on the diagonal, whose square says what an error costs. See fast/gptq.py."""
    scale = _scales_by_cost(left_GO, factor_GG.diagonal().square().reciprocal(), bits)
    times, zero = scale.float(), 1 << (bits - 1)
    step = torch.where(times == 0, 1.0, times)
    raw, errors = torch.empty(left_GO.shape, dtype=torch.uint8), torch.empty_like(left_GO)
    for i, own in enumerate(left_GO):
        q = (own / step).round_().clamp_(-zero if bits == 4 else 1 - zero, zero - 1)
        raw[i] = (q + zero).to(torch.uint8)
        torch.sub(own, q.mul_(times), out=errors[i]).div_(factor_GG[i, i])
        left_GO[i + 1 :].addr_(factor_GG[i, i + 1 :], errors[i], alpha=-1)
    return raw, scale, errors


def _scales_by_cost(block_GO: torch.Tensor, cost_G: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales bfloat16 [O]; at 4 bits of SOUGHT those whose errors cost the least."""
    low, high = block_GO.aminmax(dim=0)
    if bits == 8:
        return _upward_bfloat16(torch.maximum(high, -low).abs() / 127)
    full = torch.where(high > -low, high, low) / -8
    best, least = torch.zeros_like(full), torch.full_like(full, torch.inf)
    for shrink in SOUGHT:
        scale = (full * shrink).bfloat16().float() + 0.0
        q = (block_GO / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        cost = cost_G @ q.mul_(scale).sub_(block_GO).square_()
        better = cost < least
        best, least = torch.where(better, scale, best), torch.where(better, cost, least)
    return best.bfloat16()


def _upward_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """The next bfloat16 not below x >= 0, so that the largest value still fits 127."""
    rounded = x.to(torch.bfloat16)
    bits = rounded.view(torch.int16)
    return torch.where(rounded.float() < x, bits + 1, bits).view(torch.bfloat16)


def linear(x_NK: torch.Tensor, weight: Packed) -> torch.Tensor:
    """x W^T in x's dtype with the weight unpacked on the fly: works everywhere, saves memory, not time."""
    return F.linear(x_NK, weight.unpack(x_NK.dtype))


def quantize_activations(x_NK: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in symmetric 8 bits by group: integers int8 [N, G, group] and scales float32 [N, G]. A group with a value that
    is not finite has zeros and the scale NaN."""
    x = F.pad(x_NK.float(), (0, -x_NK.shape[1] % group)).view(len(x_NK), -1, group)
    most = x.abs().amax(-1)
    most = torch.where(most.isfinite(), most, torch.nan)
    # 127 / most would round twice
    inverse = torch.where(most > SMALLEST, torch.full_like(most, 127) / most, 0.0)
    return (x * inverse[..., None]).nan_to_num(0.0).round().to(torch.int8), most / 127


def linear_reference(x_NK: torch.Tensor, weight: Packed) -> torch.Tensor:
    """What the native kernels compute, in float64: at 32 bits, and 16 if it is wide, x times the weight; at 16 bits x in
    bfloat16 times the weight; below, 8-bit activations times integers with exact sums, then the scales."""
    if weight.bits == 32 or weight.wide:
        return (x_NK.double() @ weight.unpack(torch.float64).T).to(x_NK.dtype)
    if weight.bits == 16:
        return (x_NK.to(torch.bfloat16).double() @ weight.unpack(torch.float64).T).to(x_NK.dtype)
    x, x_scales = quantize_activations(x_NK, weight.group)
    q, scales = weight.integers()
    sums = torch.einsum("ngk,ogk->nog", x.double(), q.view(*scales.shape, weight.group).double())
    y = torch.einsum("nog,ng,og->no", sums, x_scales.double(), scales.double())
    return y[:, : weight.outputs].to(x_NK.dtype)
