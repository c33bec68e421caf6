"""Drawing tokens of rows of logits on the native kernels, as native_src/draw.h says; engine/sampling.py is the slow twin.

    drawing = Drawing(kernels.library)
    outside = drawing.draw(logits_RV, temperatures, top_ps, min_ps, top_ks, numbers_R)
    while any(outside): outside = drawing.again(numbers_R)
    drawing.tokens

Two passes over a row that stays in the processor's cache, where PyTorch makes a dozen and shares each out among threads.
What a row gives does not depend on the others.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from octad.kernels.calls import DTYPES
from octad.kernels.calls import INT as _I
from octad.kernels.calls import POINTER as _P
from octad.kernels.compile import Library


class _Draws(ctypes.Structure):
    """draw.h's Draws."""

    _fields_ = [(name, _P) for name in ("temperature", "top_p", "min_p", "top_k")]


class Drawing:
    """The library's functions and the memory that they use again at the next step. For one thread at a time."""

    def __init__(self, library: Library) -> None:
        self._draw = library.function("draw", [_P, _I, _I, _I, _I, _P, _P, _P, _P, _P, _P, _I])
        self._again = library.function("draw_again", [_I, _I, _P, _P, _P, _P, _P, _I])
        self._weights = torch.empty(0)

    def draw(
        self,
        logits_RV: torch.Tensor,
        temperatures: Sequence[float],
        top_ps: Sequence[float],
        min_ps: Sequence[float],
        top_ks: Sequence[int],
        numbers: Sequence[float],
    ) -> list[bool]:
        """Draw a token of each row, by its number in [0, 1); says which rows have to be drawn again. Logits float32 or
        bfloat16 on the CPU, each row in one piece; top_k 0 and top_p 1: all tokens."""
        (R, V), stride = logits_RV.shape, logits_RV.stride(0)
        if self._weights.numel() < 2 * R * V:
            self._weights = torch.empty(2 * R * V)
        self._tokens, self._outside, self._nucleus = ((kind * R)() for kind in (_I, _I, ctypes.c_double))
        arrays = [(ctypes.c_float * R)(*some) for some in (temperatures, top_ps, min_ps)]
        ks = (_I * R)(*top_ks)
        draws = _Draws(*[ctypes.addressof(array) for array in arrays], ctypes.addressof(ks))
        self._shape = R, V
        row = (logits_RV.data_ptr(), DTYPES[logits_RV.dtype], R, V, stride, ctypes.byref(draws))
        return self._outside_of(self._draw, row, numbers)

    def again(self, numbers: Sequence[float]) -> list[bool]:
        """Draw those rows anew, among likelier tokens; says as `draw` which rows are left."""
        return self._outside_of(self._again, self._shape, numbers)

    def _outside_of(
        self, function: Callable[..., Any], given: Sequence[Any], numbers: Sequence[float]
    ) -> list[bool]:
        """Call one of the two, whose last arguments are alike."""
        numbers_R = (ctypes.c_double * len(numbers))(*numbers)
        scratch = self._weights.data_ptr(), self._nucleus
        function(*given, numbers_R, *scratch, self._tokens, self._outside, torch.get_num_threads())
        return [bool(row) for row in self._outside]

    @property
    def tokens(self) -> list[int]:
        """What was drawn."""
        return list(self._tokens)
