"""TrainRouter: a router that learns. Swapped in for octad.model's Router, whose weights it shares.

    routers = swap_routers(model, RoutingSpec(balance=1e-2))
    ... forward ...
    loss = loss + routers[0].take().loss(spec)
    routers[0].finish_step(rate)                  # the auxiliary-loss-free bias follows the load of the step

In eval mode without a bias it computes exactly what Router does. In training it can add jitter to its inputs, sample
its experts, drop what exceeds an expert's capacity, and it gives a single expert's weight a gradient: renormalised, that
weight is 1 whatever the router says, so either the forward value stays 1 and the gradient is the probability's
(straight-through), or the value is the probability itself (Switch).

Shapes: N tokens, D model, E experts, A experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from octad.errors import RecipeError
from octad.model.balance import (
    LoadStatistics,
    expert_load,
    load_balancing_loss,
    router_entropy,
    router_z_loss,
    update_bias,
)
from octad.model.moe import MoE, Router
from octad.model.transformer import Transformer
from octad.train.sections import RoutingSpec


@dataclass(frozen=True)
class Routed:
    """What one forward pass decided: logits_NE with their graph, experts_NA before capacity."""

    logits: torch.Tensor
    experts: torch.Tensor

    def loss(self, spec: RoutingSpec) -> torch.Tensor:
        """The layer's weighted balancing and z losses."""
        total = self.logits.new_zeros(())
        if spec.balance:
            total = total + spec.balance * load_balancing_loss(self.logits, self.experts)
        if spec.z:
            total = total + spec.z * router_z_loss(self.logits)
        return total


class TrainRouter(nn.Module):
    """A router with the forward of octad.model.moe.Router, and what training adds. `bias` is state, not a parameter."""

    bias: torch.Tensor
    load: torch.Tensor

    def __init__(self, router: Router, spec: RoutingSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(router.weight.detach().float())
        self.top_k, self.normalise, self.spec = router.top_k, router.normalise, spec
        self.register_buffer("bias", self.weight.new_zeros(len(self.weight)).detach())
        self.register_buffer("load", self.bias.to(torch.int64), persistent=False)
        self._routed: Routed | None = None
        self._entropy: list[torch.Tensor] = []
        self._dropped: list[torch.Tensor] = []
        self._chosen = 0

    def forward(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """weights_NA in float32 and experts_NA, best first; in training, choices beyond the capacity are -1, weight 0."""
        x_ND = x_ND.float()
        if self.training and self.spec.jitter:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.spec.jitter, 1 + self.spec.jitter)
        logits_NE = F.linear(x_ND, self.weight)
        p_NE = logits_NE.softmax(-1)
        experts_NA = self._choose(p_NE.detach())
        weights_NA = self._weigh(p_NE.gather(-1, experts_NA))
        if not (self.training and torch.is_grad_enabled()):
            return weights_NA, experts_NA
        self._routed = Routed(logits_NE, experts_NA)
        kept_NA = self._within_capacity(experts_NA)
        return weights_NA.masked_fill(~kept_NA, 0.0), experts_NA.masked_fill(~kept_NA, -1)

    def take(self) -> Routed:
        """The last forward pass, counted into the step's load and then forgotten."""
        if self._routed is None:
            raise ValueError("the router has not run in training mode since it was asked last")
        routed, self._routed = self._routed, None
        E, served = len(self.weight), self._within_capacity(routed.experts)
        self.load += expert_load(routed.experts.masked_fill(~served, -1), E)
        self._entropy.append(router_entropy(routed.logits.detach()))
        if self.spec.capacity is not None:
            self._dropped.append((~served).sum())
        self._chosen += served.numel()
        return routed

    def tally(self) -> torch.Tensor:
        """What ranks add up: the experts' load, then entropies, how many, choices dropped, choices (float64). Nothing
        here asks the device for a value."""
        zero = self.load.new_zeros((), dtype=torch.float64)
        entropy = sum((e.double() for e in self._entropy), zero)
        dropped = sum((d.double() for d in self._dropped), zero)
        passes, chosen = (torch.full_like(zero, float(n)) for n in (len(self._entropy), self._chosen))
        return torch.cat((self.load.double(), torch.stack((entropy, passes, dropped, chosen))))

    def finish_step(
        self, rate: float, fade: float = 1.0, tally: torch.Tensor | None = None
    ) -> LoadStatistics:
        """Move the bias by `rate`, times `fade` (0 at the end: no format has a place for it); tell and clear the load.
        `tally`: the sum over all ranks, where there are several, best on the CPU."""
        *load, entropy, passes, dropped, chosen = (self.tally() if tally is None else tally).tolist()
        load_E = torch.tensor(load).long()
        statistics = LoadStatistics.of(load_E, entropy / max(1, passes), dropped / max(1, chosen))
        if rate:
            update_bias(self.bias, load_E.to(self.bias.device), rate)
            self.bias *= fade
        self.load.zero_()
        self._entropy, self._dropped, self._chosen = [], [], 0
        return statistics

    def _choose(self, p_NE: torch.Tensor) -> torch.Tensor:
        if self.training and self.spec.sample:
            return torch.multinomial(p_NE, self.top_k)
        return (p_NE + self.bias).topk(self.top_k, dim=-1).indices

    def _weigh(self, weights_NA: torch.Tensor) -> torch.Tensor:
        if not self.normalise:
            return weights_NA
        if self.top_k == 1:
            return weights_NA + (1 - weights_NA).detach()
        return weights_NA / weights_NA.sum(-1, keepdim=True)

    def _within_capacity(self, experts_NA: torch.Tensor) -> torch.Tensor:
        """kept_NA: an expert serves its first tokens, first choices before second ones."""
        if self.spec.capacity is None:
            return torch.ones_like(experts_NA, dtype=torch.bool)
        most = max(1, int(self.spec.capacity * experts_NA.numel() / len(self.weight)))
        queue = F.one_hot(experts_NA.T.flatten(), len(self.weight))  # all first choices, then all second ones
        place = (queue.cumsum(0) * queue).sum(-1)
        return (place <= most).view(experts_NA.T.shape).T


def swap_routers(model: Transformer, spec: RoutingSpec) -> list[TrainRouter]:
    """Put a TrainRouter in the place of every Router of the model, and return them by layer.

    Raises RecipeError for Switch weights where the model's family renormalises: it could not say so on disk."""
    if spec.top1 == "switch" and model.config.num_experts_per_tok == 1 and model.config.norm_topk_prob:
        raise RecipeError(
            f"routing.top1: {model.config.model_type} renormalises its weights, so 'switch' would train another model "
            "than the one saved; use straight-through"
        )
    routers = []
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp.gate = TrainRouter(cast(Router, layer.mlp.gate), spec).to(layer.mlp.gate.weight.device)  # type: ignore[arg-type]
            routers.append(layer.mlp.gate)
    return routers
