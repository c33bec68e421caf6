"""The language-model loss without its logits: next-token cross-entropy a slice of positions at a time.

    total, losses_N = next_token_loss(head, x_ND, targets_N)              # total.backward() fills dx and the head's grads

V is 50,000 and more, so the logits of a batch would be its largest tensor by far. Each slice's logits are made, turned
into their own gradient (softmax - target) and used up at once: the peak is one slice, and the backward pass has nothing
left to do but scale. A teacher's hidden states mix its distribution into the target (distillation at temperature 1):
target = (1 - share) * next token + share * teacher.

Shapes: N positions, D model, V vocabulary, R rank of a low-rank change of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F

from octad.kernels.passes import CACHED, quick_passes
from octad.train.data import IGNORED

SLICE = 512  # positions whose logits exist at one time


@dataclass(frozen=True)
class Head:
    """logits = x W' + scale * (x A') B': weight [V, D]; a [R, D] and b [V, R], or None for no low-rank change."""

    weight: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Teacher:
    """Another model's hidden states x_ND of the same positions, its head's weight [V, D], and its share of the target."""

    x: torch.Tensor
    weight: torch.Tensor
    share: float


def next_token_loss(
    head: Head, x_ND: torch.Tensor, targets_N: torch.Tensor, teacher: Teacher | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of losses in nats (cross-entropy against the target, as above), and each position's -ln p(next token),
    0 where it is not learnt, without a gradient. Both float32."""
    total, losses = cast(
        tuple[torch.Tensor, torch.Tensor],
        _SlicedLoss.apply(x_ND, head.weight, head.a, head.b, head.scale, targets_N, teacher),  # type: ignore[no-untyped-call]
    )
    return total, losses


class _SlicedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        targets_N: torch.Tensor,
        teacher: Teacher | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of losses and each position's nats [N]; gradients are worked out along the way."""
        wanted = ctx.needs_input_grad[:4]
        grads = [
            torch.zeros_like(t) if t is not None and w else None
            for t, w in zip((x_ND, weight, a, b), wanted, strict=True)
        ]
        head, losses = Head(weight, a, b, scale), x_ND.new_empty(len(x_ND), dtype=torch.float32)
        total = losses.new_zeros(())
        room = x_ND.new_empty(min(SLICE, len(x_ND)), len(weight))
        for start in range(0, len(x_ND), SLICE):
            at = slice(start, start + SLICE)
            logits = _logits(head, x_ND[at], room)
            taught = None if teacher is None else F.linear(teacher.x[at], teacher.weight)
            losses[at], mixed = _to_gradients(logits, targets_N[at], taught, teacher)
            total += mixed
            if any(wanted):
                _accumulate(grads, head, x_ND[at], logits, at)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Those gradients, times the sum's own."""
        grads = [None if g is None else g.mul_(outer[0].to(g.dtype)) for g in ctx.saved_tensors]
        return (*grads, None, None, None)


def _logits(head: Head, x: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """In `room`: a new tensor of this size, filled for the first time, costs as much as the product."""
    logits = torch.mm(x, head.weight.T, out=room[: len(x)])
    if head.a is not None and head.b is not None:
        logits.addmm_(F.linear(x, head.a), head.b.T, alpha=head.scale)
    return logits


def _to_gradients(
    logits: torch.Tensor, targets: torch.Tensor, taught: torch.Tensor | None, teacher: Teacher | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits into their own gradient, in place; each position's nats, and the sum of losses. A few rows at a time."""
    if teacher is None or taught is None:
        losses = quick_passes().cross_entropy_(logits, targets)
        return losses, losses.sum()
    losses = targets.new_empty(len(targets), dtype=torch.float32)
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(targets)
    total = losses.new_zeros(())
    for start in range(0, len(targets), rows):
        at = slice(start, start + rows)
        log_p, learnt = logits[at].float().log_softmax(-1), targets[at] != IGNORED
        losses[at] = F.nll_loss(log_p, targets[at], ignore_index=IGNORED, reduction="none")
        target = taught[at].float().softmax(-1)
        total += _mixed(losses[at], log_p, learnt, teacher.share, target)
        logits[at] = _logit_gradient(log_p, targets[at], learnt, teacher.share, target)
    return losses, total


def _mixed(
    losses: torch.Tensor, log_p: torch.Tensor, learnt: torch.Tensor, share: float, target: torch.Tensor
) -> torch.Tensor:
    return (1 - share) * losses.sum() - share * (target * log_p).sum(-1)[learnt].sum()


def _logit_gradient(
    log_p: torch.Tensor, targets: torch.Tensor, learnt: torch.Tensor, share: float, target: torch.Tensor
) -> torch.Tensor:
    """softmax - target in place of log_p; zero where nothing is learnt."""
    d, rows = log_p.exp_(), torch.arange(len(targets), device=targets.device)
    d[rows, targets.clamp(min=0)] -= 1 - share
    d -= share * target
    return d.mul_(learnt[:, None])


def _accumulate(
    grads: list[torch.Tensor | None], head: Head, x: torch.Tensor, d: torch.Tensor, at: slice
) -> None:
    """Add a slice's part to the gradients of x, weight, a and b."""
    dx, dweight, da, db = grads
    if dx is not None:
        dx[at] = d @ head.weight
    if dweight is not None:
        dweight.addmm_(d.T, x)
    if head.a is None or head.b is None:
        return
    d_b = head.scale * (d @ head.b)
    if dx is not None:
        dx[at] += d_b @ head.a
    if da is not None:
        da.addmm_(d_b.T, x)
    if db is not None:
        db += head.scale * (d.T @ F.linear(x, head.a))
