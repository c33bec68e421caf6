"""A model directory whose linear layers are rounded to 8 or 4 bits, in compressed-tensors' "pack-quantized" layout.

    source = QuantizedSource("mixture-int4")
    source.read(name)                 # as from any source: integer x scale, exactly, in float32
    source.integers(name)             # what is on disk: unsigned integers [O, K] and scales [O, G]

In the place of a weight X [O, K] the file has X_packed (int32 [O, K bits / 32], lowest bits first, 2^(bits-1) added to
each integer so that it is unsigned), X_scale (bfloat16 [O, G], one for each `group` inputs) and X_shape (int64 [2]).
`quantization_config` in config.json says so to vLLM and transformers, which read the same files. A scale may be negative:
nothing in the layout asks for its sign, and 4 bits have one value more on one side.

Source: the compressed-tensors library (compressors/pack_quantized). Only what octad writes is read: symmetric groups; one
scheme for all feed-forward nets and experts, one for all attention, one for a head that is not tied to the embeddings.

Shapes: O outputs, K inputs, G groups.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.hf import SafetensorsSource, one_by_one, open_weights, read_config, verify
from octad.checkpoint.names import HEAD, is_attention, is_linear, tensor_plan
from octad.checkpoint.schemes import Scheme, Schemes
from octad.checkpoint.source import TensorInfo
from octad.dist import dtype_name
from octad.errors import CheckpointError
from octad.guard import read_object
from octad.model.config import ModelConfig

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = (4, 8)
# Fused, too, as vLLM builds it: it looks for a module's name first, then for its class, and only then for the parts'.
ATTENTION_TARGET = r"re:.*self_attn\.(q|k|v|o|qkv)_proj$"


def stored(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """By suffix, what a weight of this shape [O, K] is on disk."""
    outputs, inputs = shape
    return {
        "_packed": TensorInfo((outputs, inputs * scheme.bits // 32), torch.int32),
        "_scale": TensorInfo((outputs, inputs // scheme.group), torch.bfloat16),
        "_shape": TensorInfo((2,), torch.int64),
    }


def quantization_config(schemes: Schemes) -> dict[str, Any]:
    """What config.json says of a checkpoint. Experts are found as "Linear" alone (vLLM has them stacked, under another
    name); of several targets that match, a name wins over a class."""
    head = schemes.head
    groups = [_config_group(schemes.ffn, "Linear")]
    if schemes.attention != schemes.ffn:
        groups.append(_config_group(schemes.attention, ATTENTION_TARGET))
    if head is not None:
        groups.append(_config_group(head, "re:.*lm_head$"))
    routers = [r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": routers if head else [*routers, "lm_head"],
        "kv_cache_scheme": None,
    }


def _config_group(scheme: Scheme, target: str) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group,
        "dynamic": False,
    }
    return {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}


def pack_int32(raw_OK: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers uint8 [O, K] as int32 [O, K bits / 32]; K is a multiple of 8."""
    if bits == 4:
        raw_OK = raw_OK[:, 0::2] | (raw_OK[:, 1::2] << 4)
    return raw_OK.contiguous().view(torch.int32)  # safetensors and all our machines are little endian


def unpack_int32(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of pack_int32."""
    raw = packed.contiguous().view(torch.uint8)
    return raw if bits == 8 else torch.stack((raw & 15, raw >> 4), dim=-1).flatten(1)


def is_quantised(directory: Path) -> bool:
    """Whether config.json says that the weights are quantised, in whatever way."""
    config = directory / "config.json"
    return config.is_file() and bool(read_object(config).get("quantization_config"))


class QuantizedSource(SafetensorsSource):
    """A TensorSource over a quantised directory. Raises CheckpointError or ConfigError on opening."""

    def __init__(self, directory: str | os.PathLike[str], label: str | None = None) -> None:
        self.directory = Path(directory)
        self.label = label or str(directory)
        self.config = read_config(self.directory, self.label, quantised=True)
        _check_scheme(self.config.raw["quantization_config"], self.label)
        weights, raw = open_weights(self.directory)
        self._packed = _packed_weights(raw, self.config, self.label)
        self._extents = one_by_one(raw, self.config)
        self._files = [*weights, self.directory / "config.json"]
        self.weight_files = weights
        self._provenance = None
        verify(self._extents, self.config, self.label, self._packed)
        self.schemes = _schemes(self._packed, self.label)

    def names(self) -> list[str]:
        """The tensors by the names that an unquantised checkpoint gives them."""
        plan = tensor_plan(self.config)
        return [name for name in plan if name in self._packed or name in self._extents]

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` gives."""
        if name in self._packed:
            return TensorInfo(tensor_plan(self.config)[name], torch.float32)
        return super().info(name)

    def extent(self, name: str) -> Extent | None:
        """None for a quantised weight: its bytes are not what `read` gives."""
        return None if name in self._packed else super().extent(name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor; a quantised one as integer x scale, which float32 holds exactly."""
        if name not in self._packed:
            return super().read(name)
        raw, scales = self.integers(name)
        integers = raw.view(*scales.shape, -1).float().sub_(1 << (self._packed[name].bits - 1))
        return integers.mul_(scales.float()[..., None]).view(raw.shape)

    def scheme(self, name: str) -> Scheme | None:
        """How a tensor is rounded; None where it is not."""
        return self._packed.get(name)

    def integers(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a quantised weight, unsigned integers uint8 [O, K] and scales bfloat16 [O, G]."""
        packed, scales = self.held(f"{name}_packed").read(), self.held(f"{name}_scale").read()
        return unpack_int32(packed, self._packed[name].bits), scales

    def bytes_by_kind(self) -> Mapping[str, int]:
        """Bytes on disk: integers by their bits ("int4"), everything else by dtype; most first."""
        sizes: Counter[str] = Counter()
        for name, extent in self._extents.items():
            scheme = self._packed.get(name.removesuffix("_packed"))
            kind = f"int{scheme.bits}" if scheme else dtype_name(extent.info.dtype)
            sizes[kind] += extent.info.nbytes
        return dict(sizes.most_common())


def _check_scheme(config: Any, label: str) -> None:
    """Raises CheckpointError for a layout that octad does not write."""
    found = config if isinstance(config, dict) else {}
    reasons = [
        f"{key} {found.get(key)!r}"
        for key, wanted in (("quant_method", METHOD), ("format", FORMAT))
        if found.get(key) != wanted
    ]
    groups = found.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            reasons.append(f"{name} has no weights")
            continue
        wanted = {"type": "int", "symmetric": True, "strategy": "group"}
        reasons += [
            f"{key} {weights.get(key)!r}" for key, value in wanted.items() if weights.get(key) != value
        ]
        reasons += [f"{key}" for key in ("input_activations",) if group.get(key)]
        reasons += [f"{key}" for key in ("actorder", "dynamic") if weights.get(key)]
    if reasons:
        raise CheckpointError(
            f"{label}: weights are quantised in a way that octad does not read ({reasons[0]}); give the unquantised"
            " model, or a GGUF file"
        )


def _packed_weights(raw: Mapping[str, Extent], config: ModelConfig, label: str) -> dict[str, Scheme]:
    """Every quantised weight, verified. Raises CheckpointError where one is damaged or not quantised."""
    plan = tensor_plan(config)
    found = {
        name: _scheme_of(name, raw, plan[name], label)
        for name in plan
        if f"{name}_packed" in raw and (is_linear(name) or name == HEAD)
    }
    missing = [name for name in plan if is_linear(name) and name not in found]
    if missing:
        raise _not_read(label, f"{missing[0]} is not quantised")
    return found


def _schemes(packed: Mapping[str, Scheme], label: str) -> Schemes:
    """Those that the weights have. Raises CheckpointError where two of one kind differ."""
    attention = {scheme for name, scheme in packed.items() if is_attention(name)}
    ffn = {scheme for name, scheme in packed.items() if name != HEAD and not is_attention(name)}
    for kind, found in (("attention", attention), ("feed-forward nets", ffn)):
        if len(found) != 1:
            raise _not_read(label, f"its layers differ in the precision of {kind}")
    return Schemes(ffn.pop(), attention.pop(), packed.get(HEAD))


def _not_read(label: str, what: str) -> CheckpointError:
    return CheckpointError(f"{label}: {what}, which octad does not read; give the unquantised model")


def _scheme_of(name: str, raw: Mapping[str, Extent], shape: tuple[int, ...], label: str) -> Scheme:
    """Bits and group from the shapes on disk."""
    infos = {s: raw[name + s].info for s in ("_packed", "_scale", "_shape") if name + s in raw}
    columns = infos["_packed"].shape[-1] if infos["_packed"].shape else 0
    groups = infos["_scale"].shape[-1] if "_scale" in infos and infos["_scale"].shape else 0
    scheme = Scheme(columns * 32 // shape[1], shape[1] // max(1, groups))
    good = scheme.bits in BITS and groups and scheme.group % 8 == 0 and shape[1] % scheme.group == 0
    if not good or infos != stored(scheme, shape):
        sizes = ", ".join(f"{name}{suffix} {list(info.shape)} {info.dtype}" for suffix, info in infos.items())
        raise CheckpointError(
            f"{label}: {sizes} do not make a weight {list(shape)} of {BITS[0]} or {BITS[1]} bits in groups of"
            " bfloat16 scales; quantise the model again"
        )
    return scheme
