"""A quantised checkpoint as modules that hold its very integers and scales: what saved.py wrote, loaded as it is.

    model = load_quantized(QuantizedSource("mixture-int4"), torch.bfloat16)

optimize.py moves them into native modules. A tied head is rounded from the embeddings on loading, as ever.
"""

from __future__ import annotations

import torch
from torch import nn

from octad.checkpoint.load import load_model
from octad.checkpoint.names import parameter_sources
from octad.checkpoint.quantized import QuantizedSource
from octad.fast.quantize import PackedExperts, PackedLinear
from octad.kernels.packed import Packed
from octad.kernels.packing import quick_pack_raw
from octad.model.moe import MoE
from octad.model.transformer import DecoderLayer, Transformer


def load_quantized(
    source: QuantizedSource, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Transformer:
    """A Transformer in eval mode whose rounded layers are PackedLinear and PackedExperts, all else in `dtype`."""
    sources = parameter_sources(source.config)
    rounded = {parameter: names for parameter, names in sources.items() if source.scheme(names[0])}
    model = load_model(source, dtype, device, leave=rounded)
    for parameter, names in rounded.items():
        if parameter.endswith(".weight"):  # stacked experts have none
            place_linear(model, parameter, packed_weight(source, names[0], device))
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        if isinstance(layer.mlp, MoE):
            at = f"model.layers.{number}.mlp.experts"
            halves = [packed_weight(source, name, device) for name in sources[f"{at}.gate_up_proj"]]
            down = [packed_weight(source, name, device) for name in sources[f"{at}.down_proj"]]
            layer.mlp.experts = PackedExperts(halves[0::2], halves[1::2], down)
    return model


def packed_weight(source: QuantizedSource, name: str, device: torch.device | str = "cpu") -> Packed:
    """A rounded weight with the very integers and scales of the file, in the layout of the kernels."""
    scheme = source.scheme(name)
    assert scheme is not None
    raw, scales = source.integers(name)
    packed = quick_pack_raw(raw, scales, scheme.bits, raw.shape[1])
    return Packed(packed.panels.to(device), packed.outputs, packed.inputs, packed.bits, packed.group)


def place_linear(model: nn.Module, parameter: str, weight: Packed) -> None:
    """PackedLinear in the place of the nn.Linear that has this `parameter` (its weight), whose bias it takes over."""
    path = parameter.removesuffix(".weight")
    parent, _, leaf = path.rpartition(".")
    old = model.get_submodule(path)
    assert isinstance(old, nn.Linear)
    setattr(model.get_submodule(parent), leaf, PackedLinear(weight, old.bias))
