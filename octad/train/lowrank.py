"""Low-rank changes of frozen weights: W + scale * B A, learnt through A and B alone (LoRA, arXiv 2106.09685).

    add_low_rank(model, r"self_attn\\.[qkvo]_proj|embed_tokens", LowRankSpec(rank=16))
    low_rank_deltas(model)["model.layers.0.self_attn.q_proj.weight"]       # (A [R, in], B [out, R], scale)
    start_from(model, open_member("adapters/french", base))                # go on from an adapter

B begins at zero, so that the model is unchanged until it learns. The frozen weight's own gradient, which costs as much as
the forward pass, is never computed. Merging happens outside, in float32, on the weights as they are on disk.

Shapes: R rank, V vocabulary, D model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from octad.checkpoint.lora import AdapterSource
from octad.errors import RecipeError
from octad.fast.products import projected
from octad.fast.training_experts import PROJECTIONS, TrainExperts
from octad.model.transformer import Transformer
from octad.train.sections import LowRankSpec

Factors = tuple[torch.Tensor, torch.Tensor, float]


class LowRankLinear(nn.Module):
    """A linear layer [in to out] with a low-rank change."""

    def __init__(self, base: nn.Linear, spec: LowRankSpec, device: torch.device | None = None) -> None:
        super().__init__()
        self.base, self.scale = base, spec.alpha / spec.rank
        out, into = base.weight.shape
        self.lora_A = nn.Parameter(_first(base.weight, spec.rank, into, device=device))
        self.lora_B = nn.Parameter(base.weight.new_zeros(out, spec.rank, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]; on CPUs a few hundred rows at a time, elsewhere plain
        products, which torch.compile takes whole."""
        if x.device.type == "cpu":
            return projected(x, self)[0]
        y: torch.Tensor = self.base(x)
        return y.add_(F.linear(F.linear(x, self.lora_A), self.lora_B), alpha=self.scale)


class LowRankEmbedding(nn.Module):
    """An embedding [V, D] with a low-rank change; a tied head takes the factors from here (see loss.Head)."""

    def __init__(self, base: nn.Embedding, spec: LowRankSpec, device: torch.device | None = None) -> None:
        super().__init__()
        self.base, self.scale = base, spec.alpha / spec.rank
        V, D = base.weight.shape
        self.lora_A = nn.Parameter(_first(base.weight, spec.rank, D, device=device))
        self.lora_B = nn.Parameter(base.weight.new_zeros(V, spec.rank, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """The changed matrix [V, D], made anew at each call: what a tied head multiplies by outside training."""
        return torch.addmm(self.base.weight, self.lora_B, self.lora_A, alpha=self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] to [..., D]."""
        x: torch.Tensor = self.base(tokens)
        return x + self.scale * F.linear(F.embedding(tokens, self.lora_B), self.lora_A.T)


def add_low_rank(
    model: Transformer, pattern: str, spec: LowRankSpec, device: torch.device | None = None
) -> list[str]:
    """Change every linear layer, embedding and stack of experts whose name the pattern is found in; returns their
    names. The factors are on `device`, or where the weights are."""
    wrappers = {nn.Linear: LowRankLinear, nn.Embedding: LowRankEmbedding}
    changed = []
    for name, module in list(model.named_modules()):
        if not re.search(pattern, name):
            continue
        if isinstance(module, TrainExperts):
            _change_experts(module, spec, device)
        elif type(module) in wrappers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrappers[type(module)](module, spec, device))
        else:
            continue
        changed.append(name)
    return changed


def low_rank_deltas(model: nn.Module, values: Mapping[str, torch.Tensor] | None = None) -> dict[str, Factors]:
    """The changed parameters' names, and A [R, in], B [out, R], scale of each (of stacked experts [E, R, in] and
    [E, out, R]); from `values` by the factors' names (the float32 masters) where given."""
    found: dict[str, Factors] = {}

    def factor(name: str) -> torch.Tensor:
        value = model.get_parameter(name) if values is None else values[name]
        return value.detach().float()

    for name, module in model.named_modules():
        if isinstance(module, (LowRankLinear, LowRankEmbedding)):
            found[f"{name}.weight"] = factor(f"{name}.lora_A"), factor(f"{name}.lora_B"), module.scale
        elif isinstance(module, TrainExperts) and module.scale:
            for stack in (f"{name}.{projection}" for projection in PROJECTIONS):
                found[f"{stack}_proj"] = factor(f"{stack}_lora_A"), factor(f"{stack}_lora_B"), module.scale
    return found


@torch.no_grad()
def start_from(model: nn.Module, adapter: AdapterSource) -> None:
    """Set the low-rank changes to an adapter's; a different scale is worked into B.

    Raises RecipeError where the adapter changes what does not learn here, or has another rank."""
    modules = {
        f"{name}.weight": m
        for name, m in model.named_modules()
        if isinstance(m, (LowRankLinear, LowRankEmbedding))
    }
    if other := sorted(adapter.changed() - set(modules)):
        raise RecipeError(
            f"{adapter.label}: changes {other[0]}, which this mode does not train; choose mode adapter, or another start"
        )
    for name in sorted(adapter.changed()):
        factors, module = adapter.delta_factors(name), modules[name]
        if factors is None or factors[0].shape != module.lora_A.shape:
            found = "whole weights" if factors is None else f"rank {len(factors[0])}"
            raise RecipeError(
                f"{adapter.label}: {name} has {found}, low_rank.rank is {len(module.lora_A)}; make them equal"
            )
        a, b, scale = factors
        module.lora_A.copy_(a)
        module.lora_B.copy_(b * (scale / module.scale))


def _change_experts(experts: TrainExperts, spec: LowRankSpec, device: torch.device | None) -> None:
    factors = {}
    for projection in PROJECTIONS:
        weight = experts.get_parameter(f"{projection}_proj")
        E, out, into = weight.shape
        first = _first(weight, E, spec.rank, into, device=device)
        factors[projection] = (first, weight.new_zeros(E, out, spec.rank, device=device))
    experts.change(factors, spec.alpha / spec.rank)


def _first(like: torch.Tensor, *shape: int, device: torch.device | None = None) -> torch.Tensor:
    """A's first values, as PEFT draws them: uniform within 1 / sqrt(in)."""
    bound = 1 / math.sqrt(shape[-1])
    return (
        torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound).to(device or like.device, like.dtype)
    )
