"""The shared part of a mixture: how attention, norms and embeddings of E members become one tensor.

    merged = METHODS["ties"](base, members, weights, density=0.2)

Each method is a pure function of tensors. `base` is exact when the members differ from it in their feed-forward nets
alone (FlexOlmo, arXiv 2507.07024); the others are weight averages with ever more care for conflicting changes. All
arithmetic is in float32; a member that did not change a tensor takes part with a zero delta. Members are gone through
once, one at a time: the sequence may read each when it is asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch

from octad.combine.recipe import SharedSpec


class Method(Protocol):
    """base [..], members E x [..], weights [E] summing to 1: the merged tensor, float32."""

    def __call__(
        self,
        base: torch.Tensor,
        members: Sequence[torch.Tensor],
        weights: Sequence[float],
        *,
        spec: SharedSpec,
        name: str,
    ) -> torch.Tensor:
        """The merged tensor, float32, shape of base."""


def keep_base(
    base: torch.Tensor,
    members: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    spec: SharedSpec,
    name: str,
) -> torch.Tensor:
    """The base's own tensor."""
    return base.float()


def linear(
    base: torch.Tensor,
    members: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    spec: SharedSpec,
    name: str,
) -> torch.Tensor:
    """Weighted mean of the members (model soup, arXiv 2203.05482)."""
    merged = torch.zeros_like(base, dtype=torch.float32)
    for member, weight in zip(members, weights, strict=True):
        merged.add_(member.float(), alpha=weight)
    return merged


def mean(
    base: torch.Tensor,
    members: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    spec: SharedSpec,
    name: str,
) -> torch.Tensor:
    """Plain mean of the members, whatever their weights."""
    return linear(base, members, [1 / len(members)] * len(members), spec=spec, name=name)


def ties(
    base: torch.Tensor,
    members: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    spec: SharedSpec,
    name: str,
) -> torch.Tensor:
    """TIES (arXiv 2306.01708): trim each delta to its largest entries, elect a sign, average what agrees with it."""
    up, up_mass, down, down_mass = (torch.zeros_like(base, dtype=torch.float32) for _ in range(4))
    for member, weight in zip(members, weights, strict=True):
        delta = trim(member.float() - base.float(), spec.density)
        up.add_(delta.clamp(min=0), alpha=weight)
        up_mass.add_(delta > 0, alpha=weight)
        down.add_(delta.clamp(max=0), alpha=weight)
        down_mass.add_(delta < 0, alpha=weight)
    upwards = up + down >= 0
    elected, mass = torch.where(upwards, up, down), torch.where(upwards, up_mass, down_mass)
    return base.float() + spec.scale * elected / mass.clamp_min(1e-12)


def dare(
    base: torch.Tensor,
    members: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    spec: SharedSpec,
    name: str,
) -> torch.Tensor:
    """DARE (arXiv 2311.03099): drop entries of each delta at random, rescale the rest, add their weighted mean.

    The draw depends on the seed, the tensor's name and the member's place alone, so that a run repeats itself."""
    merged = torch.zeros_like(base, dtype=torch.float32)
    for place, (member, weight) in enumerate(zip(members, weights, strict=True)):
        draw = torch.Generator().manual_seed(zlib.crc32(f"{spec.seed}/{place}/{name}".encode()))
        keep = torch.rand(base.shape, generator=draw) < spec.density
        merged.add_((member.float() - base.float()) * keep, alpha=weight / spec.density)
    return base.float() + spec.scale * merged


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` share of entries with the largest magnitude; the others become zero."""
    keep = max(1, int(density * delta.numel()))
    kept = delta.abs().flatten().topk(keep).indices
    trimmed = torch.zeros_like(delta.flatten())
    trimmed[kept] = delta.flatten()[kept]
    return trimmed.view_as(delta)


METHODS: dict[str, Method] = {
    "base": keep_base,
    "mean": mean,
    "linear": linear,
    "ties": ties,
    "dare": dare,
    "regmean": linear,  # of what is no linear layer of attention; those are settled by regmean.py
}
