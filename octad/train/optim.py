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
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from octad.fast.pieces import Piece, like, local
from octad.train.sections import OptimizerSpec, ScheduleSpec

_OUTSIDE = ("embed_tokens", "lm_head")  # Muon is for matrices inside the layers


def learning_rate(step: int, steps: int, spec: ScheduleSpec) -> float:
    """The factor on the top rate at a step (0 to steps - 1); reaches 1 with the last warm-up step, then falls to
    `final` at the last step."""
    if step < (rise := spec.rise(steps)):
        return (step + 1) / rise
    if spec.name == "constant":
        return 1.0
    start = max(rise, round(steps * (1 - spec.decay))) if spec.name == "wsd" else rise
    done = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if spec.name == "cosine" else 1 - done
    return spec.final + (1 - spec.final) * share


@dataclass
class _Master:
    """One trainable parameter: this rank's float32 values, and the views of them that an optimiser steps; `split`: a
    stack of matrices, one leaf each, of which this rank's first has the number `first`."""

    name: str
    parameter: nn.Parameter
    values: torch.Tensor
    leaves: list[nn.Parameter]
    split: bool = False
    first: int = 0

    def zero(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class Optimizer:
    """AdamW, or Muon for the layers' matrices and AdamW for the rest, over masters of the named parameters.

    `pieces`: where a rank's part of a parameter lies, for those that are not whole on every rank."""

    def __init__(
        self,
        trainable: Mapping[str, nn.Parameter],
        spec: OptimizerSpec,
        pieces: Mapping[str, Piece] = MappingProxyType({}),
    ) -> None:
        self.spec, self.pieces = spec, pieces
        self.masters = {
            name: _master(name, p, self._is_muon(name, p), pieces.get(name)) for name, p in trainable.items()
        }
        self.parts = list(self._parts())

    def values(self) -> dict[str, torch.Tensor]:
        """The float32 masters by name; DTensors where a rank has only a part."""
        return {name: self._placed(name, master.values) for name, master in self.masters.items()}

    def collect(self) -> None:
        """Add the parameters' gradients to the masters' and free them."""
        for name in self.masters:
            self.collect_of(name)

    @torch.no_grad()
    def collect_of(self, name: str) -> None:
        """The same for one parameter."""
        master = self.masters[name]
        grad, master.parameter.grad = master.parameter.grad, None
        if grad is None:
            return
        grad = local(grad)
        pieces = grad.unbind() if master.split else [grad]
        for leaf, piece in zip(master.leaves, pieces, strict=True):
            if leaf.grad is None:
                leaf.grad = like(piece.float(), leaf)
            else:
                local(leaf.grad).add_(piece)

    def named_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of all that collect() has added up, float32, with the parameter's name, in their order."""
        for name in self.masters:
            yield from ((name, gradient) for gradient in self.gradients_of(name))

    def gradients_of(self, name: str) -> list[torch.Tensor]:
        """Those of one parameter: a tensor a leaf."""
        return [local(leaf.grad) for leaf in self.masters[name].leaves if leaf.grad is not None]

    def gradients(self) -> list[torch.Tensor]:
        """The same without names."""
        return [gradient for _, gradient in self.named_gradients()]

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
            mine = local(master.parameter)
            if master.values.data_ptr() != mine.data_ptr():
                mine.copy_(master.values)
            master.zero()

    # ---- state ---------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Masters and moments by name: all that a step depends on besides gradient and rate."""
        tensors = {f"master.{name}": value for name, value in self.values().items()}
        for master, key, leaf, part in self._leaves():
            for kind, value in part.state[leaf].items():
                tensors[f"{kind}.{key}"] = self._moment(master, value)
        return tensors

    def state_targets(self, names: Container[str]) -> dict[str, torch.Tensor]:
        """Tensors to read the named parts of a saved state into; load_state_tensors then takes them."""
        tensors = {
            f"master.{name}": self._placed(name, torch.empty_like(m.values))
            for name, m in self.masters.items()
        }
        for master, key, leaf, _ in self._leaves():
            for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if f"{kind}.{key}" in names:
                    tensors[f"{kind}.{key}"] = self._moment(master, torch.empty_like(leaf.detach()))
            if f"step.{key}" in names:
                tensors[f"step.{key}"] = torch.zeros(())
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go back to what state_tensors told, bit for bit."""
        for name, master in self.masters.items():
            master.values.copy_(local(tensors[f"master.{name}"]))
            local(master.parameter).copy_(master.values)
        for _, key, leaf, part in self._leaves():
            kinds = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
            found = {k: tensors[f"{k}.{key}"] for k in kinds if f"{k}.{key}" in tensors}
            if found:
                part.state[leaf] = {
                    k: v if k == "step" else like(local(v).clone(), leaf) for k, v in found.items()
                }

    # ---- inside --------------------------------------------------------------------------------------------

    def _leaves(self) -> Iterator[tuple[_Master, str, nn.Parameter, torch.optim.Optimizer]]:
        """Every leaf with its master, its name (numbered where a parameter has several) and its optimiser."""
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, master in self.masters.items():
            for number, leaf in enumerate(master.leaves, master.first):
                yield master, (f"{name}.{number}" if master.split else name), leaf, owner[id(leaf)]

    def _placed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self.pieces[name].wrap(values) if name in self.pieces else values

    def _moment(self, master: _Master, value: torch.Tensor) -> torch.Tensor:
        """Something shaped like a leaf, in its place in the whole."""
        if master.split or value.dim() == 0 or isinstance(value, DTensor):
            return value
        return self._placed(master.name, value)

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


def _master(name: str, parameter: nn.Parameter, muon: bool, piece: Piece | None) -> _Master:
    values = local(parameter.detach())
    values = values if values.dtype == torch.float32 else values.float()
    split = muon and values.dim() == 3
    if piece is None or not muon:
        pieces: Sequence[torch.Tensor] = values.unbind() if split else [values]
    elif not split:
        pieces = [piece.wrap(values)]
    else:
        pieces = [piece.matrix().wrap(v) if piece.splits_matrices() else v for v in values.unbind()]
    leaves = [nn.Parameter(p) for p in pieces]
    return _Master(name, parameter, values, leaves, split, piece.first if piece and split else 0)
