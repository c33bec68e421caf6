"""The mixture-of-experts feed-forward layer: a router picks experts, experts do the work.

    weights_NA, experts_NA = router(x_ND)             # softmax over experts, the best A, renormalised
    y_ND = experts(x_ND, weights_NA, experts_NA)      # the expert seam: every faster path has this signature

The router works in float32 whatever the model's dtype. A token costs A of E experts: the total size is near the sum of
the members, the price of a token near one. The loop over experts below is the reference path that defines the others.

Shapes: N tokens, D model, E experts, A experts a token, F feed-forward hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from octad.model.config import ModelConfig


class Router(nn.Module):
    """Scores E experts for each token (Shazeer et al. 2017; softmax before top-k as in Mixtral, arXiv 2401.04088)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_NA in float32 and experts_NA, best first; weights sum to 1 where the family renormalises."""
        probabilities_NE = F.linear(x_ND.float(), self.weight.float()).softmax(-1)
        weights_NA, experts_NA = probabilities_NE.topk(self.top_k, dim=-1)
        if self.normalise:
            weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
        return weights_NA, experts_NA


class FixedRouter(nn.Module):
    """Sends every token to the same experts with the same weights: a member alone, or a given blend."""

    def __init__(self, experts: list[int], weights: list[float] | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.weights = weights or [1.0 / len(experts)] * len(experts)

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_NA and experts_NA, the same row N times."""
        shape = (len(x_ND), len(self.experts))
        weights = torch.tensor(self.weights, dtype=torch.float32, device=x_ND.device).expand(shape)
        return weights, torch.tensor(self.experts, device=x_ND.device).expand(shape)


class Experts(nn.Module):
    """E gated feed-forward networks, stacked: down(silu(gate(x)) * up(x)). Gate rows first, then up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))

    def expert(self, e: int, x_ND: torch.Tensor) -> torch.Tensor:
        """One expert's output y_ND."""
        gate_NF, up_NF = F.linear(x_ND, self.gate_up_proj[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate_NF) * up_NF, self.down_proj[e])

    def forward(self, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts, y_ND."""
        y_ND = torch.zeros_like(x_ND)
        for e in torch.unique(experts_NA).tolist():
            rows, slots = (experts_NA == e).nonzero(as_tuple=True)
            out = self.expert(e, x_ND[rows]) * weights_NA[rows, slots, None].to(x_ND.dtype)
            y_ND.index_add_(0, rows, out)
        return y_ND


class MLP(nn.Module):
    """The dense gated feed-forward network: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """y of the same shape as x, [..., D]."""
        y: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))
        return y


class MoE(nn.Module):
    """Router and experts, with Qwen2-MoE's shared expert (its own sigmoid gate) where the config has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate: nn.Module = Router(config)
        self.experts: nn.Module = Experts(config)
        self.shared_expert: MLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """y_BSD."""
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_NA, experts_NA = self.gate(x_ND)
        y_ND: torch.Tensor = self.experts(x_ND, weights_NA, experts_NA)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert_gate(x_ND).sigmoid() * self.shared_expert(x_ND)
        return y_ND.view_as(x_BSD)
