"""Balance of a mixture: the losses and the bias that keep experts busy, and what their load looks like.

    loss = load_balancing_loss(logits_NE, experts_NA) + 1e-3 * router_z_loss(logits_NE)
    update_bias(bias_E, load_E, rate=1e-3)
    LoadStatistics.of(load_E, logits_NE)            # MaxVio, entropy, dead experts

Balancing trades quality for even use: when the domains are known its weight is near zero, from scratch it is about 1e-2
(Switch Transformers, arXiv 2101.03961). Pure functions of tensors; routers and trainers decide what to feed them.

Shapes: N tokens, E experts, A experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def expert_load(experts_NA: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens each expert gets, load_E (int64); a dropped choice is -1 and counts nowhere."""
    chosen = experts_NA.flatten() + 1
    load = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    return load.scatter_add_(0, chosen, torch.ones_like(chosen))[
        1:
    ]  # a bincount would ask a GPU for the largest


def load_balancing_loss(logits_NE: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
    """E * sum over experts of (share of choices) * (mean probability): A when even, up to E * A when not.

    arXiv 2101.03961, equations 4 to 6, for A choices as Mixtral counts them. Gradients flow through the probability."""
    E = logits_NE.shape[-1]
    share_E = expert_load(experts_NA, E).to(logits_NE.dtype) / len(logits_NE)
    return E * (share_E * logits_NE.softmax(-1).mean(0)).sum()


def router_z_loss(logits_NE: torch.Tensor) -> torch.Tensor:
    """Mean square of the logits' log-sum-exp, which keeps them small (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_NE.logsumexp(-1).square().mean()


def update_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> None:
    """One step of auxiliary-loss-free balancing, in place: up for experts below the mean load, down for those above
    (arXiv 2408.15664, algorithm 1). The bias only decides who is chosen, never a weight."""
    load = load_E.to(bias_E.dtype)
    bias_E += rate * torch.sign(load.mean() - load)


@dataclass(frozen=True)
class LoadStatistics:
    """share: of the choices, by expert. max_violation: the largest load over the mean load, less 1 (MaxVio,
    arXiv 2408.15664). entropy: of a token's probabilities, mean, in nats (ln E: undecided). dead: experts without a
    token. dropped: share of choices that found their expert full."""

    share: tuple[float, ...]
    max_violation: float
    entropy: float
    dead: tuple[int, ...]
    dropped: float = 0.0

    @classmethod
    def of(cls, load_E: torch.Tensor, entropy: float, dropped: float = 0.0) -> LoadStatistics:
        """From the experts' loads (choices that were served). An idle layer has an infinite violation of nothing: 0."""
        total = float(load_E.sum())
        share = tuple(float(n) / total if total else 0.0 for n in load_E)
        violation = max(share) * len(share) - 1 if total else 0.0
        dead = tuple(e for e, n in enumerate(load_E.tolist()) if n == 0)
        return cls(share, violation, entropy, dead, dropped)

    @classmethod
    def over(cls, steps: Sequence[LoadStatistics]) -> LoadStatistics:
        """Of several steps together: mean shares and what follows from them; dead is who had no token in any."""
        columns = list(zip(*(s.share for s in steps), strict=True))
        share = tuple(sum(column) / len(steps) for column in columns)
        violation = max(share) * len(share) - 1 if any(share) else 0.0
        entropy = sum(s.entropy for s in steps) / len(steps)
        dropped = sum(s.dropped for s in steps) / len(steps)
        return cls(share, violation, entropy, tuple(e for e, s in enumerate(share) if not s), dropped)


def router_entropy(logits_NE: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the tokens' probabilities, in nats: 0 when certain, ln E when undecided."""
    log_p = logits_NE.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
