"""Optimisers over float32 masters: AdamW and Muon, parameter groups, learning-rate schedules, clipping.

    optimizer = Optimizer(trainable, OptimizerSpec(lr=1e-3), schedule)
    optimizer.collect()                    # after each backward pass: gradients add up in float32
    norm = optimizer.step(step)            # clips, steps, writes the model's own (bfloat16) copies

The model computes in bfloat16, where a step of 1e-4 would often round to nothing; what learns is a float32 master of
each trainable weight, and the sum of its gradients is float32 too. In a float32 model the master is the weight itself.
Muon (torch.optim.Muon) orthogonalises one matrix at a time: stacked experts [E, out, in] are handed to it as E views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octad.train.sections import OptimizerSpec, ScheduleSpec

_OUTSIDE = ("embed_tokens", "lm_head")  # Muon is for matrices inside the layers


def learning_rate(step: int, steps: int, spec: ScheduleSpec) -> float:
    """The factor on the top rate at a step (0 to steps - 1); reaches 1 with the last warm-up step, then falls to
    `final` at the last step."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    if spec.name == "constant":
        return 1.0
    start = max(spec.warmup, round(steps * (1 - spec.decay))) if spec.name == "wsd" else spec.warmup
    done = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if spec.name == "cosine" else 1 - done
    return spec.final + (1 - spec.final) * share


@dataclass
class _Master:
    """One trainable parameter: float32 values, their gradient, and the views of them that an optimiser steps."""

    name: str
    parameter: nn.Parameter
    values: torch.Tensor
    leaves: list[nn.Parameter]

    def zero(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class Optimizer:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest, over masters of the named parameters."""

    def __init__(self, trainable: Mapping[str, nn.Parameter], spec: OptimizerSpec) -> None:
        self.spec = spec
        self.masters = {name: _master(name, p, self._is_muon(name, p)) for name, p in trainable.items()}
        self.parts = list(self._parts())

    def values(self) -> dict[str, torch.Tensor]:
        """The float32 masters by name."""
        return {name: master.values for name, master in self.masters.items()}

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameters' gradients to the masters' and free them."""
        for master in self.masters.values():
            grad, master.parameter.grad = master.parameter.grad, None
            if grad is None:
                continue
            pieces = [grad] if len(master.leaves) == 1 else grad.unbind()
            for leaf, piece in zip(master.leaves, pieces, strict=True):
                if leaf.grad is None:
                    leaf.grad = piece.float()
                else:
                    leaf.grad.add_(piece)

    def gradients(self) -> list[torch.Tensor]:
        """All that collect() has added up, float32, in the order of the parameters."""
        return [leaf.grad for m in self.masters.values() for leaf in m.leaves if leaf.grad is not None]

    @torch.no_grad()
    def norm(self) -> float:
        """The length of the whole gradient; not finite where any of it is not."""
        grads = self.gradients()
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    @torch.no_grad()
    def step(self, factor: float, norm: float) -> None:
        """One step at `factor` of the top rates, the gradient of length `norm` clipped; then the copies follow."""
        if norm > self.spec.clip:
            for master in self.masters.values():
                for leaf in master.leaves:
                    if leaf.grad is not None:
                        leaf.grad.mul_(self.spec.clip / norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["top_lr"] * factor
            part.step()
        for master in self.masters.values():
            if master.values.data_ptr() != master.parameter.data_ptr():
                master.parameter.copy_(master.values)
            master.zero()

    # ---- state ---------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name: all that a step depends on besides gradient and rate."""
        tensors = {f"master.{name}": master.values for name, master in self.masters.items()}
        for name, leaf, part in self._leaves():
            for key, value in part.state[leaf].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go back to what state_tensors told, bit for bit."""
        for name, master in self.masters.items():
            master.values.copy_(tensors[f"master.{name}"])
            master.parameter.copy_(master.values)
        keys = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
        for name, leaf, part in self._leaves():
            found = {key: tensors[f"{key}.{name}"].clone() for key in keys if f"{key}.{name}" in tensors}
            if found:
                part.state[leaf] = found

    # ---- inside --------------------------------------------------------------------------------------------

    def _leaves(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Every leaf with its name (numbered where a parameter has several) and the optimiser that steps it."""
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, master in self.masters.items():
            for number, leaf in enumerate(master.leaves):
                yield (name if len(master.leaves) == 1 else f"{name}.{number}"), leaf, owner[id(leaf)]

    def _is_muon(self, name: str, parameter: nn.Parameter) -> bool:
        outside = any(part in name for part in (*_OUTSIDE, "mlp.gate.", "lora_"))
        return self.spec.name == "muon" and parameter.dim() >= 2 and not outside

    def _parts(self) -> Iterator[torch.optim.Optimizer]:
        spec, adamw, muon = self.spec, list[dict[str, Any]](), list[dict[str, Any]]()
        for is_muon, group in self._groups():
            (muon if is_muon else adamw).append(group)
        if adamw:
            betas = (spec.beta1, spec.beta2)
            yield torch.optim.AdamW(adamw, lr=spec.lr, betas=betas, eps=spec.eps, fused=True)
        if muon:
            yield torch.optim.Muon(muon, lr=spec.lr, momentum=spec.momentum, adjust_lr_fn="match_rms_adamw")

    def _groups(self) -> Iterator[tuple[bool, dict[str, Any]]]:
        """Groups of equal rate and decay, and whether Muon steps them, in the order of the parameters."""
        spec, groups = self.spec, dict[tuple[bool, float, float], list[nn.Parameter]]()
        for name, master in self.masters.items():
            router = "mlp.gate." in name
            rate = spec.router_lr or spec.lr if router else spec.lr
            decay = 0.0 if router or master.parameter.dim() < 2 else spec.weight_decay
            groups.setdefault((self._is_muon(name, master.parameter), rate, decay), []).extend(master.leaves)
        for (muon, rate, decay), leaves in groups.items():
            yield muon, {"params": leaves, "top_lr": rate, "weight_decay": decay}


def _master(name: str, parameter: nn.Parameter, split: bool) -> _Master:
    values = parameter.detach()
    values = values if values.dtype == torch.float32 else values.float()
    pieces: Sequence[torch.Tensor] = values.unbind() if split and values.dim() == 3 else [values]
    return _Master(name, parameter, values, [nn.Parameter(piece) for piece in pieces])
