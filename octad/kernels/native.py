"""The native kernels as functions of tensors: native.c says what they compute, packed.py has formats and the slow twin.

    kernels = NativeKernels(load())
    w = describe([linear.weight])              # or of a Packed; the tensors behind it must stay where they are
    y_NO, = kernels.linear(w, x_NK)

Each call costs a few microseconds beside the arithmetic. Activations are float32 or bfloat16, contiguous, on the CPU; the
caller sees to that. What a row of a batch becomes does not depend on the other rows, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octad.kernels.calls import DTYPES, check
from octad.kernels.calls import FLOAT as _F
from octad.kernels.calls import INT as _I
from octad.kernels.calls import POINTER as _P
from octad.kernels.compile import Library
from octad.kernels.packed import Packed

PACKED = {16: 2, 8: 3, 4: 4, 32: 6}  # bits -> format; numbers.h names them
WIDE = 5


class _Weight(ctypes.Structure):
    _fields_ = [
        ("data", _P),
        ("outputs", _I),
        ("inputs", _I),
        ("format", _I),
        ("group", _I),
        ("step", _I),
    ]


class BlockStruct(ctypes.Structure):
    """native.c's Block: the weights and numbers of one decoder layer."""

    _fields_ = [
        *((name, _P) for name in ("qkv", "o", "gate", "up", "down")),
        *((name, _P) for name in ("q_bias", "k_bias", "v_bias", "o_bias")),
        *((name, _P) for name in ("input_norm", "post_norm", "q_norm", "k_norm", "router")),
        *((name, _I) for name in ("E", "normalise", "D", "H", "G", "K", "window")),
        *((name, _F) for name in ("norm_eps", "head_eps", "scale")),
        ("store", _P),
    ]


FETCH = ctypes.CFUNCTYPE(None, _I, ctypes.POINTER(_I), _I, ctypes.POINTER(_I), _I)


class StoreStruct(ctypes.Structure):
    """native.c's Store: the experts of a layer, some of which are on the disk."""

    _fields_ = [("layer", _I), ("here", _P), ("guessing", _P), ("fetch", FETCH)]


class StepStruct(ctypes.Structure):
    """native.c's Step: what the tokens of one step share in all layers."""

    _fields_ = [
        *((name, _I) for name in ("dtype", "R", "width", "block_size", "start", "given")),
        *((name, _P) for name in ("positions", "slots", "lengths", "tables", "cosines", "sines")),
    ]


class EndsStruct(ctypes.Structure):
    """native.c's Ends: what a whole step has before its layers and behind them, and where its results go."""

    _fields_ = [
        *((name, _P) for name in ("tokens", "embedding", "norm", "head", "logits")),
        *((name, _P) for name in ("likeliest", "speakers", "shares")),
        ("embedding_dtype", _I),
        ("eps", _F),
    ]


@dataclass(frozen=True)
class LayerArray:
    """Pointers to the BlockStructs of some layers, and to the pages of keys and values of each."""

    blocks: Any
    keys: Any
    values: Any

    @classmethod
    def of(
        cls, blocks: Sequence[int], keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
    ) -> LayerArray:
        """From the addresses of the structs and the layers' pages."""
        pointers = _P * len(blocks)
        return cls(
            pointers(*blocks),
            pointers(*[k.data_ptr() for k in keys]),
            pointers(*[v.data_ptr() for v in values]),
        )


@dataclass(frozen=True)
class WeightArray:
    """Weights described for C, and the tensors that hold their memory."""

    structs: Any
    address: int
    outputs: tuple[int, ...]
    tensors: tuple[torch.Tensor, ...]


def describe(weights: Sequence[torch.Tensor | Packed]) -> WeightArray:
    """Plain weights [O, K] (float32 or bfloat16, contiguous) or packed ones, as an array for the kernels; they share
    their inputs and format. Raises ValueError."""
    structs = (_Weight * len(weights))()
    for struct, weight in zip(structs, weights, strict=True):
        if isinstance(weight, Packed):
            data, bytes_inside = weight.panels, weight.panels[0].is_contiguous()
            struct.outputs, struct.inputs, struct.group = weight.outputs, weight.inputs, weight.group
            struct.format, struct.step = WIDE if weight.wide else PACKED[weight.bits], data.stride(0)
        else:
            data, bytes_inside = weight, weight.is_contiguous()
            struct.outputs, struct.inputs, struct.group = *weight.shape, 1
            struct.format, struct.step = DTYPES[weight.dtype], 16 * weight.shape[1] * weight.element_size()
        if not bytes_inside:
            raise ValueError("weights for the native kernels must be contiguous")
        struct.data = data.data_ptr()
    if len({(struct.inputs, struct.group, struct.format) for struct in structs}) != 1:
        raise ValueError("weights that are called together must share their inputs and format")
    tensors = tuple(w.panels if isinstance(w, Packed) else w for w in weights)
    outputs = tuple(int(struct.outputs) for struct in structs)
    return WeightArray(structs, ctypes.addressof(structs), outputs, tensors)


class NativeKernels:
    """The compiled library with its argument types."""

    def __init__(self, library: Library) -> None:
        self.library, self.isa, self.features = library, library.isa, int(library.function("features")())
        self._linear = library.function("linear", [_P, _I, _P, _I, _I, _P, _P, _I])
        self._experts = library.function("experts", [_P, _P, _P, _I, _P, _I, _I, _P, _P, _I, _P, _I])
        self._norm = library.function("rms_norm", [_P, _I, _I, _I, _P, _F, _P, _I])
        self._rope = library.function("rope", [_P, _I, _I, _I, _I, _P, _I, _P, _P, _I])
        self._route = library.function("route", [_P, _I, _I, _I, _P, _I, _I, _I, _P, _P, _I])
        self._attend = library.function(
            "paged_attention",
            [_P, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _I, _F, _P, _I],
        )
        self._layers = library.function("layers", [_P, _I, _P, _P, _P, _P, _P, _P, _P, _I, _P, _I])

    def linear(
        self, weights: WeightArray, x_NK: torch.Tensor, biases: Sequence[torch.Tensor | None] | None = None
    ) -> list[torch.Tensor]:
        """x W^T + b for every weight, [N, O] each, in x's dtype. Biases float32."""
        N = x_NK.shape[0]
        outputs = [x_NK.new_empty((N, o)) for o in weights.outputs]
        count = len(outputs)
        places = (_P * count)(*[y.data_ptr() for y in outputs])
        extra = None
        if biases is not None:
            extra = (_P * count)(*[None if b is None else b.data_ptr() for b in biases])
        threads = torch.get_num_threads()
        check(
            self._linear(
                weights.address, count, x_NK.data_ptr(), DTYPES[x_NK.dtype], N, places, extra, threads
            )
        )
        return outputs

    def experts(
        self,
        gate: WeightArray,
        up: WeightArray,
        down: WeightArray,
        x_ND: torch.Tensor,
        weights_NA: torch.Tensor,
        experts_NA: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, y_ND. weights float32, experts int64, contiguous. Raises IndexError
        for an expert that is not there."""
        y = torch.empty_like(x_ND)
        N, A = experts_NA.shape
        check(
            self._experts(
                gate.address,
                up.address,
                down.address,
                len(gate.outputs),
                x_ND.data_ptr(),
                DTYPES[x_ND.dtype],
                N,
                weights_NA.data_ptr(),
                experts_NA.data_ptr(),
                A,
                y.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension; x and weight of one dtype."""
        y = torch.empty_like(x)
        D = x.shape[-1]
        failed = self._norm(
            x.data_ptr(),
            DTYPES[x.dtype],
            x.numel() // D,
            D,
            weight.data_ptr(),
            eps,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        check(failed)
        return y

    def rope_(
        self, x_NHK: torch.Tensor, start: int | torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor
    ) -> torch.Tensor:
        """x rotated in place; `start`: the first position, or int64 [N] positions."""
        N, H, K = x_NHK.shape
        positions, first = (start.data_ptr(), 0) if isinstance(start, torch.Tensor) else (None, start)
        self._rope(
            x_NHK.data_ptr(),
            DTYPES[x_NHK.dtype],
            N,
            H,
            K,
            positions,
            first,
            cos_TK.data_ptr(),
            sin_TK.data_ptr(),
            torch.get_num_threads(),
        )
        return x_NHK

    def route(
        self, x_ND: torch.Tensor, weight_ED: torch.Tensor, top_k: int, normalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Router.forward: weights_NA float32 and experts_NA int64. The weight is float32."""
        N, D = x_ND.shape
        weights = torch.empty(N, top_k)
        experts = torch.empty(N, top_k, dtype=torch.int64)
        failed = self._route(
            x_ND.data_ptr(),
            DTYPES[x_ND.dtype],
            N,
            D,
            weight_ED.data_ptr(),
            len(weight_ED),
            top_k,
            normalise,
            weights.data_ptr(),
            experts.data_ptr(),
            torch.get_num_threads(),
        )
        check(failed)
        return weights, experts

    def paged_attention(
        self,
        q_RHK: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        tables: torch.Tensor,
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """kernels/paged.py's paged_attention for sequences with one new token each; lengths and tables int32."""
        y = torch.empty_like(q_RHK)
        R, H, K = q_RHK.shape
        check(
            self._attend(
                q_RHK.data_ptr(),
                keys.data_ptr(),
                values.data_ptr(),
                DTYPES[q_RHK.dtype],
                lengths.data_ptr(),
                tables.data_ptr(),
                R,
                tables.shape[1],
                keys.shape[1],
                H,
                keys.shape[2],
                K,
                window or 0,
                scale,
                y.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return y

    def layers(
        self,
        layers: LayerArray,
        step: int,
        x: torch.Tensor,
        weights_LRA: torch.Tensor,
        experts_LRA: torch.Tensor,
    ) -> torch.Tensor:
        """Whole decoder layers, one after another, for sequences with one new token each; `step` is the address of a
        StepStruct. The routing is written to (or, where given, read from) the last two."""
        y = torch.empty_like(x)
        self._run(layers, step, x.data_ptr(), y.data_ptr(), weights_LRA, experts_LRA, None)
        return y

    def decode(
        self,
        layers: LayerArray,
        step: int,
        ends: int,
        weights_LRA: torch.Tensor,
        experts_LRA: torch.Tensor,
    ) -> None:
        """`layers` with what stands before and behind them, from ids to logits; `ends`: the address of an EndsStruct."""
        self._run(layers, step, None, None, weights_LRA, experts_LRA, ends)

    def _run(
        self,
        layers: LayerArray,
        step: int,
        x: int | None,
        y: int | None,
        weights_LRA: torch.Tensor,
        experts_LRA: torch.Tensor,
        ends: int | None,
    ) -> None:
        failed = self._layers(
            layers.blocks,
            len(layers.blocks),
            step,
            x,
            layers.keys,
            layers.values,
            y,
            weights_LRA.data_ptr(),
            experts_LRA.data_ptr(),
            experts_LRA.shape[-1],
            ends,
            torch.get_num_threads(),
        )
        check(failed)
