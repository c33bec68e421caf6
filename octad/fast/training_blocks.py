"""A decoder block's norms, residual sums and rotary positions for training on CPUs, in one pass each way.

    quicken(model)             # blocks, dense networks and rotation of a Transformer, in place; parameters stay

norm(x) hands x on beside its result, and h = x + attention comes together with norm(h): so a backward has both gradients
of the residual stream in one place and adds them up within the norm's own pass. Numbers are those of DecoderLayer.

Shapes: B sequences, S positions, N = B * S tokens, D model, H heads, K head dimension.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch

from octad.fast.products import projected
from octad.fast.training_experts import swap_dense
from octad.kernels.passes import quick_passes
from octad.model.cache import KVCache
from octad.model.rope import Rope
from octad.model.transformer import Attention, DecoderLayer, RMSNorm, Transformer


def quicken(model: Transformer) -> None:
    """Put the quicker ways into a model that is going to be trained here, before anything wraps its layers."""
    swap_dense(model)
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        own = layer.self_attn
        own.project = functools.partial(_project, own)  # type: ignore[method-assign]
        own.output = functools.partial(_output, own)  # type: ignore[method-assign]
        layer.forward = functools.partial(block, layer)  # type: ignore[method-assign]
    model.model.rope.apply = rotated


def block(layer: DecoderLayer, x_BSD: torch.Tensor, rope: Rope, cache: KVCache | None = None) -> torch.Tensor:
    """DecoderLayer.forward."""
    x, y = add_norm(x_BSD, None, layer.input_layernorm)
    h, z = add_norm(x, layer.self_attn(y, rope, cache), layer.post_attention_layernorm)
    out: torch.Tensor = h + layer.mlp(z)
    return out


def _project(module: Attention, x_BSD: torch.Tensor) -> list[torch.Tensor]:
    return projected(x_BSD, module.q_proj, module.k_proj, module.v_proj)


def _output(module: Attention, y: torch.Tensor) -> torch.Tensor:
    return projected(y, module.o_proj)[0]


def add_norm(
    x_BSD: torch.Tensor, delta_BSD: torch.Tensor | None, norm: RMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = x + delta, or x, and norm(h)."""
    return cast(
        tuple[torch.Tensor, torch.Tensor],
        _AddNorm.apply(x_BSD, delta_BSD, norm.weight, norm.eps),  # type: ignore[no-untyped-call]
    )


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """octad.model.rope.rotated: x [B, S, H, K], cos and sin [S, 1, K]."""
    return cast(torch.Tensor, _Rotated.apply(x, cos[:, 0], sin[:, 0]))  # type: ignore[no-untyped-call]


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See add_norm."""
        x_ND = x.reshape(-1, x.shape[-1])
        delta_ND = None if delta is None else delta.reshape(x_ND.shape)
        h_ND, y_ND, inverse_N = quick_passes().add_norm(x_ND, delta_ND, weight, eps)
        ctx.save_for_backward(h_ND, weight, inverse_N)
        ctx.both = delta is not None
        ctx.set_materialize_grads(False)
        return h_ND.view(x.shape), y_ND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, delta and the weight from h's and y's."""
        h_ND, weight, inverse_N = ctx.saved_tensors
        dh, dy = (None if g is None else g.reshape(h_ND.shape) for g in grads)
        want = ctx.needs_input_grad[2]
        if dy is None:
            return grads[0], grads[0] if ctx.both else None, None, None
        dx_ND, dweight = quick_passes().add_norm_backward(h_ND, weight, inverse_N, dh, dy, want)
        dx = dx_ND.view(cast(torch.Tensor, grads[1]).shape)
        return dx, dx if ctx.both else None, dweight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See rotated."""
        ctx.save_for_backward(cos, sin)
        return quick_passes().rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient turned back."""
        cos, sin = ctx.saved_tensors
        return quick_passes().rotate(grads[0], cos, sin, -1.0), None, None
