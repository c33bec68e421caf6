"""A PEFT LoRA adapter on disk: its configuration and tensors, checked, and what each key of the file does.

    adapter = AdapterFile.open(Path("adapters/french"))
    adapter.changes()["model.layers.0.mlp.up_proj.weight"]     # Change(a=..., b=..., scale=2.0)

Which rank and alpha hold for which module follows PEFT (`get_pattern_key` in peft/utils/other.py). Keys come as PEFT
saves them, or as a raw state dict has them, with the adapter's name inside. What a sum of base and low-rank product
cannot represent (DoRA, activated LoRA, an adapter that is relative to a base other than the one it names, ...) is
refused by the name of the field that asks for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.shard import read_header
from octad.errors import CheckpointError
from octad.guard import matches, read_object

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
PREFIX = "base_model.model."

# Fields of adapter_config.json that ask for more than W + scale * B @ A.
REFUSED = {
    "use_dora": "DoRA rescales every weight's columns",
    "use_qalora": "QALoRA pools its inputs",
    "alora_invocation_tokens": "activated LoRA applies to some positions only",
    "layer_replication": "it changes the number of layers",
    "target_parameters": "adapters of raw parameters are not read",
    "trainable_token_indices": "single trained token embeddings are not read",
    "use_bdlora": "block-diagonal LoRA is not read",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA adds a diagonal to the product",
    "monteclora_config": "MonteCLoRA samples its weights",
    "megatron_config": "Megatron's sharded layers are not read",
}
MOST_ALPHA = 1e30  # the product is computed in float32
# Initialisations that leave the base as it is; the others (pissa, olora, corda, ...) subtract from it.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Raw state dicts name the adapter too: lora_A.default.weight, lora_embedding_A.default, modules_to_save.default.weight.
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>[AB])(?:\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<embedded>[AB])(?:\.(?P<named>[^.]+))?)"
)
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?P<name>[^.]+))?)\.(?=(?:weight|bias)$)")
_ORIGINAL = ".original_module."  # a copy of what modules_to_save replaces


@dataclass(frozen=True)
class Change:
    """What the adapter does to one tensor; the values are keys of its file."""

    replaced: str | None = None
    added: str | None = None
    a: str | None = None
    b: str | None = None
    embedding: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk: its configuration and its tensors."""

    directory: Path
    config: Mapping[str, Any]
    extents: Mapping[str, Extent]

    @classmethod
    def open(cls, directory: Path) -> AdapterFile:
        """Read and check adapter_config.json, then the header of the weights. Raises CheckpointError."""
        config = _read_config(directory)
        refuse_unsupported(directory, config)
        weights = directory / WEIGHTS_FILE
        if not weights.is_file():
            pickled = (directory / PICKLE_FILE).is_file()
            fix = (
                f"only {PICKLE_FILE}, a pickle: save it again as safetensors" if pickled else "not an adapter"
            )
            raise CheckpointError(f"{directory}: {WEIGHTS_FILE} is missing ({fix})")
        if not (extents := read_header(weights)):
            raise CheckpointError(
                f"{directory}: {WEIGHTS_FILE} is empty: it holds no tensor, as sharded training leaves it that saves"
                " without gathering; save the adapter again with its weights gathered"
            )
        for key, extent in extents.items():
            if not extent.info.dtype.is_floating_point:
                raise CheckpointError(
                    f"{directory}: tensor {key} holds {str(extent.info.dtype).removeprefix('torch.')}, which is rounded"
                    " in a way that the file does not tell; save the adapter in float32 or bfloat16"
                )
        return cls(directory, config, extents)

    def read(self, key: str) -> torch.Tensor:
        """One tensor in float32."""
        return self.extents[key].read().float()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.extents[key].info.shape

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Rank and alpha / rank (rsLoRA: alpha / sqrt(rank)) of a module, patterns resolved as PEFT does."""
        try:
            rank = int(self._by_pattern("rank_pattern", module, self.config.get("r", 8)))
            alpha = float(self._by_pattern("alpha_pattern", module, self.config.get("lora_alpha", 8)))
            if not abs(alpha) < MOST_ALPHA:
                raise ValueError(f"alpha is {alpha}")
            return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: bad rank or alpha for {module}: {error}"
            ) from error

    def _by_pattern(self, patterns: str, module: str, default: Any) -> Any:
        """The value of the first of these patterns (a regular expression for the end of the module's path) that
        matches, else the default."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            where = f"{self.directory / CONFIG_FILE}: bad rank or alpha for {module}: {patterns}"
            if matches(rf"(.*\.)?({pattern})$", module, where, "match"):
                return value
        return default

    def changes(self) -> dict[str, Change]:
        """Tensor name -> what happens to it. Raises CheckpointError for a key that is not understood."""
        found: dict[str, Change] = {}
        adapters: set[str] = set()
        for key in self.extents:
            if not key.startswith(PREFIX):
                raise CheckpointError(
                    f"{self.directory}: tensor {key} is not understood (it should begin with {PREFIX})"
                )
            if _ORIGINAL in key:
                continue
            name, adapter, values = self._classify(key)
            adapters |= {adapter} if adapter else set()
            found[name] = replace(found.get(name, Change()), **values)
        if len(adapters) > 1:
            raise CheckpointError(
                f"{self.directory}: holds several adapters ({', '.join(sorted(adapters))}); save each by itself"
            )
        for name, change in found.items():
            if (change.a is None) != (change.b is None):
                raise CheckpointError(f"{self.directory}: one of the two LoRA factors for {name} is missing")
        return found

    def _classify(self, key: str) -> tuple[str, str | None, dict[str, Any]]:
        """The tensor that a key of the file changes, the adapter's name where the key has one, and how."""
        path = key.removeprefix(PREFIX)
        if match := _LOW_RANK.fullmatch(path):
            module, adapter = match["module"], match["name"] or match["named"]
            if match["kind"] == "bias" and match["part"] == "B":
                return f"{module}.bias", adapter, {"added": key, "scale": self.rank_and_scale(module)[1]}
            if match["kind"] != "bias":
                part, embedding = (match["part"] or match["embedded"]).lower(), match["embedded"] is not None
                scale = self._checked_scale(module, key, part, embedding)
                return f"{module}.weight", adapter, {part: key, "embedding": embedding, "scale": scale}
        if "lora_" in path or "token_adapter" in path:
            raise CheckpointError(
                f"{self.directory}: tensor {key} is not understood; only plain LoRA is read"
            )
        wrapper = _WRAPPER.search(path)
        return _WRAPPER.sub(".", path), wrapper["name"] if wrapper else None, {"replaced": key}

    def _checked_scale(self, module: str, key: str, part: str, embedding: bool) -> float:
        rank, scale = self.rank_and_scale(module)
        shape = self.shape(key)
        if len(shape) != 2 or shape[0 if part == "a" else 1] != rank:
            raise CheckpointError(
                f"{self.directory}: {key} is {list(shape)}, but {CONFIG_FILE} says rank {rank}"
            )
        return scale


def refuse_unsupported(directory: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError naming the field for an adapter that is more than W + scale * B @ A."""
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{directory}: peft_type {kind!r} is not supported (supported: LORA)")
    for name, reason in REFUSED.items():
        if config.get(name):
            raise CheckpointError(f"{directory}: {name} is not supported: {reason}")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise CheckpointError(
            f"{directory}: init_lora_weights {init!r} is not supported: the adapter belongs to a changed base; "
            "convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: {CONFIG_FILE} is missing; this is not a PEFT adapter")
    return read_object(path)
