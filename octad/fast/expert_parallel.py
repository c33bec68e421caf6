"""Expert parallelism from outside the model: each rank keeps some experts, tokens travel to them and back.

    spread_experts(model, mesh)                   # experts of every layer, dealt out over the ranks of a mesh

The expert seam stays as it is, forward(x_ND, weights_NA, experts_NA): before a rank's own experts run, an all-to-all
exchange sends each choice's row to the rank of its expert; after them another one brings the results home. The
exchanges are PyTorch's functional collectives, which know their own backward, so gradients travel the same way back,
and an expert's gradient holds what all tokens of the group say: it must not be added up over the group again.

Shapes: N tokens, D model, E experts, A experts a token, P ranks, R rows sent, Q rows received.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from octad.model.moe import MoE

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of every mixture layer, by name."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield f"{name}.experts", module.experts


def spread_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's experts (rank r of P: the r-th E / P of them) and let tokens travel. E is a multiple of P."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for _, experts in experts_of(model):
        mine = 0
        for name, parameter in list(experts.named_parameters(recurse=False)):
            part = parameter.detach().chunk(ranks)[rank].clone()
            setattr(experts, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
            mine = len(part)
        own = cast(Forward, experts.forward)
        experts.forward = functools.partial(exchanged, own, mine, mesh.get_group())


def exchanged(
    own: Forward,
    mine: int,
    group: dist.ProcessGroup,
    x_ND: torch.Tensor,
    weights_NA: torch.Tensor,
    experts_NA: torch.Tensor,
) -> torch.Tensor:
    """y_ND: each choice computed by `own` on the rank that has its expert, `mine` experts a rank."""
    flat = experts_NA.flatten()
    order = torch.argsort(flat, stable=True)
    order = order[int((flat < 0).sum()) :]  # dropped choices come first and stay at home
    rows = order // experts_NA.shape[1]
    chosen_R = flat[order]
    sent = torch.bincount(chosen_R // mine, minlength=group.size())
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    there, back = sent.tolist(), received.tolist()
    local_Q = _travel(chosen_R % mine, there, back, group)
    x_QD = _travel(x_ND[rows], there, back, group)
    weights_Q = _travel(weights_NA.flatten()[order].to(x_ND.dtype), there, back, group)
    y_QD = own(x_QD, weights_Q[:, None], local_Q[:, None])
    y_RD = _travel(y_QD, back, there, group)
    return torch.zeros_like(x_ND).index_add(0, rows, y_RD)


def _travel(
    rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """Rows to other ranks, sent[p] of them to rank p, and theirs here."""
    rows = rows.contiguous()
    if rows.is_floating_point():
        return all_to_all_single_autograd(rows, received, sent, group)
    arriving = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arriving, rows, received, sent, group=group)
    return arriving
