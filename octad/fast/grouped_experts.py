"""Experts on a GPU: all of a layer's as one grouped product each way, and nothing that the host waits for.

    layer.mlp.experts = GroupedExperts(layer.mlp.experts)        # shares the weights; to train and to run
    group_experts(model)                                         # every layer that grouped products can take

A loop over experts asks the device which of them have tokens, and the host waits for the answer in every layer of every
token. Here the choices are sorted on the device, the experts' ends among them stay there (grouped_mm of PyTorch reads
them itself), and every shape follows from the number of tokens alone, so that a decoding step can be captured as a CUDA
graph. A choice goes back to its place by a gather, forward and backward, and the
A choices of a token are added up in their order: adding rows by atomics, as index_add does, would give other bits in each
run. Dropped choices (expert -1) are computed by expert 0 with weight 0: shapes may not depend on them. Twin: Experts.

Grouped products are CUDA's in bfloat16 from compute capability 8.0 on; elsewhere PyTorch computes them by a loop that
waits.

Shapes: N tokens, D model, E experts, A experts a token, F feed-forward hidden, R = N * A choices in order of experts, L
rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.fast.training_experts import PROJECTIONS, TrainExperts
from octad.model.moe import Experts, MoE

ALIGNED = 16  # bytes: what rows of a grouped product's matrices are multiples of
_grouped_mm: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm  # its name before torch 2.10


class GroupedExperts(TrainExperts):
    """The signature of octad.model.moe.Experts; low-rank changes as TrainExperts has them."""

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, y_ND."""
        chosen_R, order_R = experts_NA.flatten().clamp(min=0).sort(stable=True)
        numbers_E = torch.arange(len(self.gate_up_proj), device=x_ND.device)
        ends_E = torch.searchsorted(chosen_R, numbers_E, right=True, out_int32=True)
        back_R = order_R.argsort()
        x_RD = _taken(x_ND, order_R, back_R, experts_NA.shape[1])
        wide_R2F = self._product("gate_up", x_RD, ends_E)
        h_RF = cast(torch.Tensor, _SwiGLU.apply(wide_R2F))  # type: ignore[no-untyped-call]
        y_RD = self._product("down", h_RF, ends_E)
        y_NAD = _taken(y_RD, back_R, order_R).view(*experts_NA.shape, -1)
        kept_NA = weights_NA.masked_fill(experts_NA < 0, 0.0).to(x_ND.dtype)
        return (y_NAD * kept_NA[..., None]).sum(1)

    def _product(self, projection: str, x: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """Each block of rows times its expert's matrix, and its low-rank change where there is one."""
        y = grouped(x, getattr(self, f"{projection}_proj"), ends_E)
        if not self.scale:
            return y
        a_ELI, b_EOL = self.factors(projection)
        if spare := -a_ELI.shape[1] * x.element_size() % ALIGNED // x.element_size():
            a_ELI, b_EOL = F.pad(a_ELI, (0, 0, 0, spare)), F.pad(b_EOL, (0, spare))
        return torch.add(y, grouped(grouped(x, a_ELI, ends_E), b_EOL, ends_E), alpha=self.scale)


def grouped(x_RI: torch.Tensor, weights_EOI: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """y [R, O]: the rows up to ends_E[0] times the first matrix, those up to ends_E[1] times the second, ..."""
    y: torch.Tensor = _grouped_mm(x_RI, weights_EOI.transpose(1, 2), offs=ends_E)
    return y


def group_experts(model: nn.Module) -> None:
    """Put GroupedExperts in the place of every Experts whose sizes grouped products can take."""
    for module in model.modules():
        if isinstance(module, MoE) and isinstance(module.experts, Experts) and can_group(module.experts):
            module.experts = GroupedExperts(module.experts)


def can_group(experts: Experts) -> bool:
    """Whether the rows of the experts' matrices are multiples of ALIGNED bytes."""
    stacks = (getattr(experts, f"{projection}_proj") for projection in PROJECTIONS)
    return all(stack.shape[2] * stack.element_size() % ALIGNED == 0 for stack in stacks)


def _taken(x: torch.Tensor, order_R: torch.Tensor, back_R: torch.Tensor, each: int = 1) -> torch.Tensor:
    """Row order_R[r] // each of x in place r; `back_R` is the order the other way round."""
    return cast(torch.Tensor, _Taken.apply(x, order_R, back_R, each))  # type: ignore[no-untyped-call]


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order_R: torch.Tensor, back_R: torch.Tensor, each: int
    ) -> torch.Tensor:
        """See _taken."""
        ctx.save_for_backward(back_R)
        ctx.each = each
        return x.index_select(0, order_R // each if each > 1 else order_R)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """A gather, too; a row that was taken several times adds up its gradients in order."""
        dx = grads[0].index_select(0, ctx.saved_tensors[0])
        if ctx.each > 1:
            dx = dx.view(-1, ctx.each, dx.shape[-1]).sum(1)
        return dx, None, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [R, 2F]; the backward makes silu(gate) again rather than keep it."""

    @staticmethod
    def forward(ctx: Any, wide_R2F: torch.Tensor) -> torch.Tensor:
        """h [R, F]."""
        ctx.save_for_backward(wide_R2F)
        gate_RF, up_RF = wide_R2F.chunk(2, -1)
        return F.silu(gate_RF) * up_RF

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """The gradient of both halves."""
        (wide_R2F,) = ctx.saved_tensors
        gate_RF, up_RF = wide_R2F.chunk(2, -1)
        dgate_RF = torch.ops.aten.silu_backward(grads[0] * up_RF, gate_RF)
        return torch.cat((dgate_RF, grads[0] * F.silu(gate_RF)), -1)
