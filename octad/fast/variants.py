"""The price of being a mixture: the same weights with fewer experts a token, or as one dense member.

    model = make_variant(source, "top-1", device)
    model = make_variant(source, "dense", device)       # expert 0 as the only feed-forward network

The dense member has no router and no expert path at all: a model of the size that a token of the mixture costs at top-1,
in the mixture's own tensors, run by the same engine. What the mixture is slower than that is its price.

Shapes: E experts, D model, F feed-forward hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from octad.checkpoint.load import load_model, state_tensors
from octad.checkpoint.source import TensorSource
from octad.dist import compute_dtype
from octad.errors import OctadError
from octad.model.config import dense_config
from octad.model.moe import Router
from octad.model.transformer import Transformer


def make_variant(source: TensorSource, variant: str, device: torch.device) -> Transformer:
    """ "dense", or "top-K" for K experts a token, in the machine's dtype and in eval mode."""
    if variant == "dense":
        return dense_member(source, device)
    return with_top_k(source, int(variant.removeprefix("top-")), device)


def with_top_k(source: TensorSource, k: int, device: torch.device) -> Transformer:
    """The mixture with k experts a token, all else as it is."""
    model = load_model(source, compute_dtype(device), device)
    for module in model.modules():
        if isinstance(module, Router):
            module.top_k = k
    model.config = replace(model.config, num_experts_per_tok=k)
    return model


def dense_member(source: TensorSource, device: torch.device) -> Transformer:
    """Expert 0 of a mixture as a dense model, in the mixture's own tensors; read layer by layer."""
    config, dtype = dense_config(source.config), compute_dtype(device)
    with torch.device("meta"):
        model = Transformer(config)
    layers = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]
    for prefix in ("model.embed_tokens.", "model.norm.", "lm_head.", *layers):
        tensors = state_tensors(source, source.config, prefix, dtype, device)
        model.load_state_dict(member_tensors(tensors), strict=False, assign=True)
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise OctadError(f"the dense member has no {missing[0]}")
    return model.requires_grad_(False).eval()


def member_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's tensors with expert 0 in the place of experts, router and shared expert."""
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.partition(".mlp.")
        if leaf == "experts.gate_up_proj":
            gate, up = tensor[0].clone().chunk(2)
            kept |= {f"{layer}.mlp.gate_proj.weight": gate, f"{layer}.mlp.up_proj.weight": up}
        elif leaf == "experts.down_proj":
            kept[f"{layer}.mlp.down_proj.weight"] = tensor[0].clone()
        elif not leaf.startswith(("gate.", "shared_expert")):
            kept[name] = tensor
    return kept
