"""The passes over activations between the matrix products of training: each one pass natively, several in PyTorch.

    passes = quick_passes()                         # native where there is a compiler, else PyTorch
    h_NF = passes.swiglu(gate_NF, up_NF)

Products run at the machine's rate; what lies between them is bound by reading and writing, so that one pass in place of
four counts. Plain functions of tensors without autograd. native_src/passes.h is the native half, Passes the slow twin
that defines it, and what serves where there is no compiler, on other devices and in other precisions.

Shapes: N rows, D model, F feed-forward hidden, V vocabulary, X batches of R * T query rows, S keys or positions, B
sequences, H heads, K head dimension.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from octad.kernels.attention import causal_mask
from octad.kernels.calls import DTYPES, check
from octad.kernels.calls import FLOAT as _F
from octad.kernels.calls import INT as _I
from octad.kernels.calls import POINTER as _P
from octad.kernels.compile import BuildError, Library, load

CACHED = 1 << 19  # logits that are worked on at a time: in float32 they fit a core's cache


class Passes:
    """In PyTorch's operations."""

    def swiglu(self, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up."""
        return F.silu(gate_NF).mul_(up_NF)

    def swiglu_backward(
        self,
        dh_NF: torch.Tensor,
        gate_NF: torch.Tensor,
        up_NF: torch.Tensor,
        dgate_NF: torch.Tensor,
        dup_NF: torch.Tensor,
    ) -> torch.Tensor:
        """h again; the gradients of gate and up are written to the last two, of one stride (dup may be dh)."""
        silu = F.silu(gate_NF)
        h = silu * up_NF
        torch.mul(dh_NF, up_NF, out=dgate_NF)
        torch.mul(dh_NF, silu, out=dup_NF)
        torch.ops.aten.silu_backward.grad_input(dgate_NF, gate_NF, grad_input=dgate_NF)
        return h

    def causal_softmax_(
        self, scores_XTS: torch.Tensor, block: int, window: int | None, scale: float
    ) -> torch.Tensor:
        """Softmax of scale * scores in place. A batch's rows are R times `block` queries, the last of S positions."""
        X, _, S = scores_XTS.shape
        # without a window, everything before the block is seen
        first = 0 if window is not None else S - block
        hidden = ~causal_mask(block, S, window, scores_XTS.device)[:, first:]
        # a sum is faster than filling in
        bias = scores_XTS.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        scores_XTS.mul_(scale).view(X, -1, block, S)[..., first:].add_(bias)
        return scores_XTS.copy_(scores_XTS.softmax(-1))

    def softmax_backward_(
        self, p_XTS: torch.Tensor, dp_XTS: torch.Tensor, block: int, window: int | None, scale: float
    ) -> torch.Tensor:
        """The gradient of the scores from that of the probabilities, in the latter's place."""
        return dp_XTS.copy_(torch._softmax_backward_data(dp_XTS, p_XTS, -1, p_XTS.dtype)).mul_(scale)

    def cross_entropy_(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """-ln p(target) of each row, float32 at least, 0 where the target is negative; logits become their gradient."""
        losses = logits_NV.new_empty(
            len(logits_NV), dtype=torch.promote_types(logits_NV.dtype, torch.float32)
        )
        rows = max(1, CACHED // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else len(losses)
        for start in range(0, len(losses), rows):
            at = slice(start, start + rows)
            log_p, learnt = logits_NV[at].to(losses.dtype).log_softmax(-1), targets_N[at] >= 0
            chosen = targets_N[at].clamp(min=0)[:, None]
            losses[at] = -log_p.gather(1, chosen)[:, 0] * learnt
            d = log_p.exp_().scatter_add_(1, chosen, log_p.new_full(chosen.shape, -1.0))
            logits_NV[at] = d.mul_(learnt[:, None])
        return losses

    def add_norm(
        self, x_ND: torch.Tensor, delta_ND: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h = x + delta (x itself without one), h / rms(h) * weight, and 1 / rms(h) [N] in float32 at least."""
        h = x_ND if delta_ND is None else x_ND + delta_ND
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        inverse = wide.square().mean(-1).add_(eps).rsqrt_()
        return h, (wide * inverse[:, None] * weight).to(h.dtype), inverse

    def add_norm_backward(
        self,
        h_ND: torch.Tensor,
        weight: torch.Tensor,
        inverse_N: torch.Tensor,
        dh_ND: torch.Tensor | None,
        dy_ND: torch.Tensor,
        want_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of x, which is delta's too, from those of h (or None) and of the norm; and the weight's."""
        normal = h_ND * inverse_N[:, None]
        g = dy_ND * weight.to(normal.dtype)
        dx = (g - normal * (g * normal).mean(-1, keepdim=True)) * inverse_N[:, None]
        dx = dx if dh_ND is None else dx + dh_ND
        dweight = (dy_ND * normal).sum(0).to(weight.dtype) if want_weight else None
        return dx.to(h_ND.dtype), dweight

    def rotate(
        self, x_BSHK: torch.Tensor, cos_SK: torch.Tensor, sin_SK: torch.Tensor, turn: float
    ) -> torch.Tensor:
        """x turned by the angles whose cosines and sines are given (half-split layout), or back for -1."""
        wide = x_BSHK.to(torch.promote_types(x_BSHK.dtype, cos_SK.dtype))
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1) * (turn * sin_SK[:, None])
        return (wide * cos_SK[:, None] + turned).to(x_BSHK.dtype)


class NativePasses(Passes):
    """Through the compiled library, for float32 and bfloat16 on the CPU."""

    def __init__(self, library: Library) -> None:
        self._swiglu = library.function("swiglu", [_P, _P, _I, _I, _I, _I, _P, _I])
        self._swiglu_backward = library.function(
            "swiglu_backward", [_P, _P, _I, _P, _I, _I, _I, _P, _P, _P, _I, _I]
        )
        self._softmax = library.function("causal_softmax", [_P, _I, _I, _I, _I, _I, _F, _I])
        self._softmax_backward = library.function("softmax_backward", [_P, _P, _I, _I, _I, _I, _I, _F, _I])
        self._cross_entropy = library.function("cross_entropy", [_P, _I, _I, _I, _P, _P, _I])
        self._add_norm = library.function("add_norm", [_P, _P, _P, _F, _I, _I, _I, _P, _P, _P, _I])
        self._add_norm_backward = library.function(
            "add_norm_backward", [_P, _P, _P, _P, _P, _I, _I, _I, _P, _P, _I]
        )
        self._rotate = library.function("rotate", [_P, _I, _I, _I, _I, _I, _P, _P, _F, _P, _I])

    def swiglu(self, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> torch.Tensor:
        """See Passes."""
        if not _rows(gate_NF, up_NF) or gate_NF.stride(0) != up_NF.stride(0):
            return super().swiglu(gate_NF, up_NF)
        h = gate_NF.new_empty(gate_NF.shape)
        check(
            self._swiglu(
                gate_NF.data_ptr(),
                up_NF.data_ptr(),
                gate_NF.stride(0),
                DTYPES[h.dtype],
                *h.shape,
                h.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return h

    def swiglu_backward(
        self,
        dh_NF: torch.Tensor,
        gate_NF: torch.Tensor,
        up_NF: torch.Tensor,
        dgate_NF: torch.Tensor,
        dup_NF: torch.Tensor,
    ) -> torch.Tensor:
        """See Passes."""
        strides = gate_NF.stride(0) == up_NF.stride(0) and dgate_NF.stride(0) == dup_NF.stride(0)
        if not (_rows(gate_NF, up_NF, dgate_NF, dup_NF) and _rows(dh_NF, contiguous=True) and strides):
            return super().swiglu_backward(dh_NF, gate_NF, up_NF, dgate_NF, dup_NF)
        h = torch.empty_like(dh_NF)
        check(
            self._swiglu_backward(
                gate_NF.data_ptr(),
                up_NF.data_ptr(),
                gate_NF.stride(0),
                dh_NF.data_ptr(),
                DTYPES[h.dtype],
                *h.shape,
                h.data_ptr(),
                dgate_NF.data_ptr(),
                dup_NF.data_ptr(),
                dgate_NF.stride(0),
                torch.get_num_threads(),
            )
        )
        return h

    def causal_softmax_(
        self, scores_XTS: torch.Tensor, block: int, window: int | None, scale: float
    ) -> torch.Tensor:
        """See Passes."""
        if not _rows(scores_XTS, contiguous=True):
            return super().causal_softmax_(scores_XTS, block, window, scale)
        X, rows, S = scores_XTS.shape
        about = (DTYPES[scores_XTS.dtype], X * rows, S, block, window or 0, scale, torch.get_num_threads())
        check(self._softmax(scores_XTS.data_ptr(), *about))
        return scores_XTS

    def softmax_backward_(
        self, p_XTS: torch.Tensor, dp_XTS: torch.Tensor, block: int, window: int | None, scale: float
    ) -> torch.Tensor:
        """See Passes."""
        if not _rows(p_XTS, dp_XTS, contiguous=True):
            return super().softmax_backward_(p_XTS, dp_XTS, block, window, scale)
        X, rows, S = p_XTS.shape
        about = (DTYPES[p_XTS.dtype], X * rows, S, block, window or 0, scale, torch.get_num_threads())
        check(self._softmax_backward(p_XTS.data_ptr(), dp_XTS.data_ptr(), *about))
        return dp_XTS

    def cross_entropy_(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """See Passes."""
        if not _rows(logits_NV, contiguous=True):
            return super().cross_entropy_(logits_NV, targets_N)
        if len(targets_N) != len(logits_NV):
            raise IndexError(f"{len(targets_N)} targets for {len(logits_NV)} rows of logits")
        if len(targets_N) and int(targets_N.max()) >= logits_NV.shape[1]:
            raise IndexError(f"target {int(targets_N.max())} is not among {logits_NV.shape[1]} logits")
        targets, losses = (
            targets_N.to(torch.int64).contiguous(),
            logits_NV.new_empty(len(logits_NV), dtype=torch.float32),
        )
        about = (DTYPES[logits_NV.dtype], *logits_NV.shape, targets.data_ptr(), losses.data_ptr())
        check(self._cross_entropy(logits_NV.data_ptr(), *about, torch.get_num_threads()))
        return losses

    def add_norm(
        self, x_ND: torch.Tensor, delta_ND: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Passes."""
        if not _rows(x_ND, x_ND if delta_ND is None else delta_ND, weight, contiguous=True):
            return super().add_norm(x_ND, delta_ND, weight, eps)
        h, y = x_ND if delta_ND is None else torch.empty_like(x_ND), torch.empty_like(x_ND)
        inverse = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        given = (x_ND.data_ptr(), _place(delta_ND), weight.data_ptr(), eps, DTYPES[x_ND.dtype], *x_ND.shape)
        check(self._add_norm(*given, h.data_ptr(), y.data_ptr(), inverse.data_ptr(), torch.get_num_threads()))
        return h, y, inverse

    def add_norm_backward(
        self,
        h_ND: torch.Tensor,
        weight: torch.Tensor,
        inverse_N: torch.Tensor,
        dh_ND: torch.Tensor | None,
        dy_ND: torch.Tensor,
        want_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Passes."""
        if not _rows(h_ND, weight, dy_ND, dy_ND if dh_ND is None else dh_ND, contiguous=True):
            return super().add_norm_backward(h_ND, weight, inverse_N, dh_ND, dy_ND, want_weight)
        dx, threads = torch.empty_like(h_ND), torch.get_num_threads()
        parts = inverse_N.new_zeros(threads, h_ND.shape[1]) if want_weight else None
        given = (h_ND.data_ptr(), weight.data_ptr(), inverse_N.data_ptr(), _place(dh_ND), dy_ND.data_ptr())
        about = (DTYPES[h_ND.dtype], *h_ND.shape)
        check(self._add_norm_backward(*given, *about, dx.data_ptr(), _place(parts), threads))
        return dx, None if parts is None else parts.sum(0).to(weight.dtype)

    def rotate(
        self, x_BSHK: torch.Tensor, cos_SK: torch.Tensor, sin_SK: torch.Tensor, turn: float
    ) -> torch.Tensor:
        """See Passes."""
        tables = _rows(cos_SK, sin_SK, contiguous=True) and cos_SK.dtype == torch.float32
        if not (tables and _rows(x_BSHK, contiguous=True)):
            return super().rotate(x_BSHK, cos_SK, sin_SK, turn)
        y = torch.empty_like(x_BSHK)
        B, S, H, K = x_BSHK.shape
        about = (x_BSHK.data_ptr(), DTYPES[y.dtype], B * S, H, K, S, cos_SK.data_ptr(), sin_SK.data_ptr())
        check(self._rotate(*about, turn, y.data_ptr(), torch.get_num_threads()))
        return y


@functools.cache
def _built() -> tuple[Passes, str]:
    try:
        return NativePasses(load()), ""
    except BuildError as error:
        return Passes(), str(error)


def quick_passes() -> Passes:
    """The native ones, built at the first call of all, where that can be done here."""
    return _built()[0]


def not_native() -> str:
    """Why quick_passes gives PyTorch's, in one line; nothing where it does not."""
    return _built()[1]


def _rows(*tensors: torch.Tensor, contiguous: bool = False) -> bool:
    """True where the kernels can take them: of one known dtype, on the CPU, neighbours side by side."""
    first = tensors[0]
    return first.dtype in DTYPES and all(
        t.device.type == "cpu"
        and t.dtype == first.dtype
        and (t.is_contiguous() if contiguous else t.stride(-1) == 1)
        for t in tensors
    )


def _place(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
