"""Rounding and packing weights in one pass over memory: packed.py's pack, pack_raw and quantize, natively.

    w = quick_pack(weight_OK, 4)                     # as pack: the same bits, some twenty times as fast
    w = quick_pack(weight_OK, 4, cost_K=cost_K)      # the same, but for sums in another order
    raw, scales = quick_quantize(weight_OK, 4, 32)   # as quantize
    w = quick_pack_raw(raw, scales, 4, inputs)       # as pack_raw

packed.py is the slow twin, and what serves where the kernels cannot be had, for weights on other devices, and for those
that are not finite numbers. Each call runs on PyTorch's number of threads and lets go of Python's lock, so that a
caller's threads that share nothing are as good.

Shapes: O outputs, K inputs, P panels, G groups of inputs; K' is K padded to whole groups.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from octad.kernels.calls import DTYPES, check
from octad.kernels.calls import INT as _I
from octad.kernels.calls import POINTER as _P
from octad.kernels.compile import BuildError, Library, load
from octad.kernels.packed import (
    SOUGHT,
    Empty,
    Packed,
    pack,
    pack_raw,
    quantize,
    round_in_turn,
)
from octad.kernels.panels import GROUPS, PANEL, panel_bytes

NOT_FINITE = 3


class _Packing:
    """The library's functions with their argument types."""

    def __init__(self, library: Library) -> None:
        self.pack = library.function("pack", [_P, _I, _I, _I, _I, _I, _I, _P, _P, _I, _I])
        self.quantise = library.function("quantise", [_P, _I, _I, _I, _I, _I, _I, _P, _P, _P, _I])
        self.in_turn = library.function("round_in_turn", [_P, _I, _I, _P, _I, _P, _I, _P, _P, _P, _I])
        self.pack_raw = library.function("pack_raw", [_P, _P, _I, _I, _I, _I, _P, _I, _I])


@functools.cache
def _packing() -> _Packing | None:
    try:
        return _Packing(load())
    except BuildError:
        return None


def quick_pack(
    weight_OK: torch.Tensor,
    bits: int,
    group: int | None = None,
    empty: Empty | None = None,
    *,
    wide: bool = False,
    cost_K: torch.Tensor | None = None,
) -> Packed:
    """See packed.pack. The panels that `empty` makes may lie apart, each in one piece."""
    native, group = _packing(), group or GROUPS[bits]
    if native is None or weight_OK.device.type != "cpu":
        return pack(weight_OK, bits, group, empty, wide=wide, cost_K=cost_K)
    weight = _rows(weight_OK)
    outputs, inputs = weight.shape
    shape = -(-outputs // PANEL), panel_bytes(bits, group, inputs)
    panels = empty(shape) if empty else torch.empty(shape, dtype=torch.uint8)
    cost = _costs(cost_K, inputs, group)
    about = (weight.data_ptr(), DTYPES[weight.dtype], weight.stride(0), outputs, inputs, bits, group)
    costs = None if cost is None else cost.data_ptr()
    failed = native.pack(*about, costs, panels.data_ptr(), panels.stride(0), torch.get_num_threads())
    if failed == NOT_FINITE:
        panels.copy_(pack(weight_OK, bits, group, cost_K=cost_K).panels)
    else:
        check(failed)
    return Packed(panels, outputs, inputs, bits, group, wide and bits == 16)


def quick_quantize(weight_OK: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See packed.quantize."""
    native = _packing()
    if native is None or weight_OK.device.type != "cpu":
        return quantize(weight_OK, bits, group)
    weight = _rows(weight_OK)
    raw = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty(len(raw), raw.shape[1] // group, dtype=torch.bfloat16)
    about = (weight.data_ptr(), DTYPES[weight.dtype], weight.stride(0), *weight.shape, bits, group)
    failed = native.quantise(*about, None, raw.data_ptr(), scales.data_ptr(), torch.get_num_threads())
    if failed == NOT_FINITE:
        return quantize(weight_OK, bits, group)
    check(failed)
    return raw, scales


def quick_pack_raw(
    raw_OK: torch.Tensor, scales_OG: torch.Tensor, bits: int, inputs: int, empty: Empty | None = None
) -> Packed:
    """See packed.pack_raw. The panels that `empty` makes may lie apart, each in one piece."""
    native = _packing()
    if native is None or raw_OK.device.type != "cpu":
        return pack_raw(raw_OK, scales_OG, bits, inputs, empty)
    raw, scales = raw_OK.contiguous(), scales_OG.to(torch.bfloat16).contiguous()
    outputs, groups = scales.shape
    group = raw.shape[1] // groups
    shape = -(-outputs // PANEL), panel_bytes(bits, group, groups * group)
    panels = empty(shape) if empty else torch.empty(shape, dtype=torch.uint8)
    given = (raw.data_ptr(), scales.data_ptr(), outputs, groups, group, bits)
    check(native.pack_raw(*given, panels.data_ptr(), panels.stride(0), torch.get_num_threads()))
    return Packed(panels, outputs, inputs, bits, group)


def quick_round_in_turn(
    left_GO: torch.Tensor, factor_GG: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See packed.round_in_turn; sums come in another order."""
    native = _packing()
    if native is None or left_GO.device.type != "cpu" or not left_GO.is_contiguous():
        return round_in_turn(left_GO, factor_GG, bits)
    factor = factor_GG.float().contiguous()
    raw, errors = torch.empty(left_GO.shape, dtype=torch.uint8), torch.empty_like(left_GO)
    scales = torch.empty(left_GO.shape[1], dtype=torch.bfloat16)
    sought = (ctypes.c_float * len(SOUGHT))(*SOUGHT)
    given = (left_GO.data_ptr(), *left_GO.shape, factor.data_ptr(), bits, sought, len(SOUGHT))
    made = (raw.data_ptr(), scales.data_ptr(), errors.data_ptr())
    check(native.in_turn(*given, *made, torch.get_num_threads()))
    return raw, scales, errors


def _costs(cost_K: torch.Tensor | None, inputs: int, group: int) -> torch.Tensor | None:
    """Those of K' inputs as the library reads them."""
    return None if cost_K is None else F.pad(cost_K.float(), (0, -inputs % group)).contiguous()


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight in a type that the kernels read, a row's values side by side."""
    known = weight.detach() if weight.dtype in DTYPES else weight.detach().float()
    return known if known.stride(1) == 1 else known.contiguous()
