"""AdapterSource: a base with a PEFT LoRA adapter on top, seen as one model.

    member = AdapterSource(base, "adapters/french")
    member.read("model.layers.0.mlp.up_proj.weight")    # W + scale * B @ A, computed in float32

Nothing is merged on disk: a tensor that the adapter leaves alone is the base's own, one that it touches is
added up when it is read. Which rank and alpha hold for which module follows PEFT (`get_pattern_key` in
peft/utils/other.py). What a sum of base and low-rank product cannot represent (DoRA, activated LoRA, an
adapter that is relative to a base other than the one it names, ...) is refused by the name of the field that
asks for it.
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
from octad.checkpoint.names import EMBEDDING, HEAD
from octad.checkpoint.shard import read_header
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.errors import CheckpointError
from octad.fingerprint import fingerprint
from octad.guard import matches, read_object
from octad.model.config import ModelConfig

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
# Initialisations that leave the base as it is; the others (pissa, olora, corda, ...) subtract from it.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A\.weight|lora_B\.weight)"
)
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)\.(?=(weight|bias)$)")


@dataclass(frozen=True)
class _Change:
    """What the adapter does to one tensor; the values are keys of its file."""

    replaced: str | None = None
    added: str | None = None
    a: str | None = None
    b: str | None = None
    embedding: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class _Adapter:
    """An adapter on disk: its configuration and its tensors."""

    directory: Path
    config: Mapping[str, Any]
    extents: Mapping[str, Extent]

    @classmethod
    def open(cls, directory: Path) -> _Adapter:
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
        return cls(directory, config, read_header(weights))

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

    def changes(self) -> dict[str, _Change]:
        """Tensor name -> what happens to it. Raises CheckpointError for a key that is not understood."""
        found: dict[str, _Change] = {}
        for key in self.extents:
            if not key.startswith(PREFIX):
                raise CheckpointError(
                    f"{self.directory}: tensor {key} is not understood (it should begin with {PREFIX})"
                )
            name, values = self._classify(key)
            found[name] = replace(found.get(name, _Change()), **values)
        for name, change in found.items():
            if (change.a is None) != (change.b is None):
                raise CheckpointError(f"{self.directory}: one of the two LoRA factors for {name} is missing")
        return found

    def _classify(self, key: str) -> tuple[str, dict[str, Any]]:
        """The tensor that a key of the file changes, and how."""
        path = key.removeprefix(PREFIX)
        if path.endswith(".lora_B.bias"):
            module = path.removesuffix(".lora_B.bias")
            return f"{module}.bias", {"added": key, "scale": self.rank_and_scale(module)[1]}
        if match := _LOW_RANK.fullmatch(path):
            part = "b" if "_B" in match["part"] else "a"
            embedding = "embedding" in match["part"]
            scale = self._checked_scale(match["module"], key, part, embedding)
            return f"{match['module']}.weight", {part: key, "embedding": embedding, "scale": scale}
        if "lora_" in path or "token_adapter" in path:
            raise CheckpointError(
                f"{self.directory}: tensor {key} is not understood; only plain LoRA is read"
            )
        return _WRAPPER.sub(".", path), {"replaced": key}

    def _checked_scale(self, module: str, key: str, part: str, embedding: bool) -> float:
        rank, scale = self.rank_and_scale(module)
        shape = self.shape(key)
        if len(shape) != 2 or shape[0 if part == "a" else 1] != rank:
            raise CheckpointError(
                f"{self.directory}: {key} is {list(shape)}, but {CONFIG_FILE} says rank {rank}"
            )
        return scale


class AdapterSource:
    """A TensorSource: `base` with the adapter in `directory`. Tensors come in the base's dtypes.

    Raises CheckpointError for an adapter that is damaged, made for another base, or not plain LoRA. Where the
    base ties its head to the embedding and the adapter changes only one of the two, the model is presented
    untied: that is what the adapter computes, while PEFT's merge_and_unload writes one shared matrix and so
    changes both.
    """

    def __init__(self, base: TensorSource, directory: str | Path, label: str | None = None) -> None:
        self.base = base
        self.path = Path(directory)
        self.label = label or str(directory)
        self._adapter = _Adapter.open(self.path)
        self._changes = self._adapter.changes()
        self._check_fit()
        self._drop_copies()
        self.config: ModelConfig = self._resolve_tying()
        self._digests: list[dict[str, Any]] | None = None

    @property
    def directory(self) -> Path | None:
        """The adapter's directory where it has a tokenizer of its own, else the base's."""
        return self.path if (self.path / "tokenizer.json").is_file() else self.base.directory

    def names(self) -> list[str]:
        """The base's tensors, and the head where it is no longer tied."""
        names = self.base.names()
        if self._untied and HEAD not in names:
            names = [*names, HEAD]
        return names

    def changed(self) -> set[str]:
        """Names of the tensors that the adapter touches."""
        return set(self._changes)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, as the base's."""
        return self.base.info(self._in_base(name))

    def read(self, name: str) -> torch.Tensor:
        """The base's tensor, or replaced, or with the product of the factors added; float32 inside."""
        change, dtype = self._changes.get(name), self.info(name).dtype
        if change is None:
            return self.base.read(self._in_base(name))
        value = self._replaced_or_base(name, change)
        if change.added is not None:
            value += change.scale * self._adapter.read(change.added)
        if (factors := self.delta_factors(name)) is not None:
            a, b, scale = factors
            value.addmm_(b, a, alpha=scale)
        return value.to(dtype)

    def extent(self, name: str) -> Extent | None:
        """The base's, where the adapter leaves the tensor alone."""
        return None if name in self._changes else self.base.extent(self._in_base(name))

    def delta_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A [R, in], B [out, R] and scale with delta = scale * B @ A, float32; None where there is no
        low-rank change.
        """
        change = self._changes.get(name)
        if change is None or change.a is None or change.b is None:
            return None
        a, b = self._adapter.read(change.a), self._adapter.read(change.b)
        if change.embedding:  # an embedding's weight [V, D] is the transpose of a linear layer's
            a, b = b.T.contiguous(), a.T.contiguous()
        return a, b, change.scale

    def provenance(self) -> Mapping[str, Any]:
        """Kind, label, name, bytes and SHA-256 of the adapter's files, and the base's provenance."""
        if self._digests is None:
            self._digests = [fingerprint(self.path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        return {
            "kind": "adapter",
            "label": self.label,
            "files": self._digests,
            "base": self.base.provenance(),
        }

    def _replaced_or_base(self, name: str, change: _Change) -> torch.Tensor:
        if change.replaced is not None:
            return self._adapter.read(change.replaced)
        base = self.base.read(self._in_base(name))
        return base if base.dtype == torch.float32 else base.float()

    def _in_base(self, name: str) -> str:
        """Where the base keeps it: a head that the adapter unties is the base's embedding."""
        return EMBEDDING if name == HEAD and self._head_is_embedding else name

    @property
    def _head_is_embedding(self) -> bool:
        return self.base.config.tie_word_embeddings and HEAD not in self.base.names()

    @property
    def _untied(self) -> bool:
        return self.base.config.tie_word_embeddings and not self.config.tie_word_embeddings

    # ---- opening -------------------------------------------------------------------------------------------

    def _check_fit(self) -> None:
        """Every change is to a tensor that the base has, and of its shape."""
        names = set(self.base.names()) | ({HEAD} if self._head_is_embedding else set())
        for name, change in self._changes.items():
            if name not in names:
                if change.added is not None:
                    raise CheckpointError(
                        f"{self.path}: lora_bias adds {name}, but the base has no such bias to merge into"
                    )
                raise CheckpointError(
                    f"{self.path}: made for another base: it changes {name}, which {self.base.label} lacks"
                )
            expected = self.base.info(self._in_base(name)).shape
            for found in self._shapes(change):
                if found != expected:
                    sizes = f"{name} should be {list(expected)}, the adapter fits {list(found)}"
                    raise CheckpointError(
                        f"{self.path}: made for another base: {sizes} (base {self.base.label})"
                    )

    def _shapes(self, change: _Change) -> list[tuple[int, ...]]:
        """The shapes that the tensor would need to have for the change to fit."""
        shapes = [self._adapter.shape(key) for key in (change.replaced, change.added) if key is not None]
        if change.a is not None and change.b is not None:
            a, b = self._adapter.shape(change.a), self._adapter.shape(change.b)
            shapes.append((a[1], b[0]) if change.embedding else (b[0], a[1]))
        return shapes

    def _drop_copies(self) -> None:
        """PEFT saves the whole embedding and head next to an adapter that touches them; where they are the
        base's, forget them.
        """
        for name in (EMBEDDING, HEAD):
            change = self._changes.get(name)
            if change is None or change.replaced is None:
                continue
            base = self.base.read(self._in_base(name))
            if torch.equal(base, self._adapter.read(change.replaced).to(base.dtype)):
                self._changes[name] = replace(change, replaced=None)
                if change.a is None:
                    del self._changes[name]

    def _resolve_tying(self) -> ModelConfig:
        """The base's configuration, with the head untied where the adapter parts it from the embedding."""
        config = self.base.config
        touched = {name for name in (EMBEDDING, HEAD) if name in self._changes}
        if not config.tie_word_embeddings or not touched:
            return config
        if self._adapter.config.get("ensure_weight_tying") and EMBEDDING in touched:
            self._changes.pop(HEAD, None)
            return config
        return replace(config, tie_word_embeddings=False, raw={**config.raw, "tie_word_embeddings": False})


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
