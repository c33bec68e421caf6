"""Distillation from the members: each window's own expert, alone, tells the mixture what it would say.

    teacher = teach(learner, batch, cache)        # None where nothing is distilled

The teacher is the mixture as it was before training, its routers told the expert of each token, so that it costs one
forward pass at top-1 and, where weights are frozen, no memory.

Shapes: B windows, S positions, N = B * S tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from octad.model.cache import KVCache
from octad.model.moe import MoE
from octad.train.data import Batch
from octad.train.learner import Learner
from octad.train.loss import Teacher


class ToldRouter(nn.Module):
    """Sends token n to experts_N[n] with weight 1."""

    def __init__(self, experts_N: torch.Tensor) -> None:
        super().__init__()
        self.experts = experts_N[:, None]

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_N1 (ones) and experts_N1."""
        return torch.ones(self.experts.shape, device=x_ND.device), self.experts


@torch.no_grad()
def teach(learner: Learner, batch: Batch, cache: KVCache | None) -> Teacher | None:
    """The hidden states of each window's own member, and its head."""
    if learner.teacher is None:
        return None
    expert_of = {s.name: learner.members.index(s.expert or s.name) for s in learner.data.sources}
    experts_B = torch.tensor([expert_of[name] for name, _ in batch.windows], device=batch.tokens.device)
    router = ToldRouter(experts_B.repeat_interleave(batch.tokens.shape[1]))
    for layer in learner.teacher.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate = router
    x_ND = learner.teacher.model(batch.tokens, cache).flatten(0, 1)
    head = learner.teacher.lm_head or learner.teacher.model.embed_tokens
    return Teacher(x_ND, head.weight, learner.distill)  # type: ignore[arg-type]
