"""AdapterSource: a base with a PEFT LoRA adapter on top, seen as one model.

    member = AdapterSource(base, "adapters/french")
    member.read("model.layers.0.mlp.up_proj.weight")    # W + scale * B @ A, computed in float32

Nothing is merged on disk: a tensor that the adapter leaves alone is the base's own, one that it touches is
added up when it is read. What the file may hold is adapter_file.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, Change
from octad.checkpoint.extent import Extent
from octad.checkpoint.names import EMBEDDING, HEAD
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.errors import CheckpointError
from octad.fingerprint import fingerprint
from octad.model.config import ModelConfig


class AdapterSource:
    """A TensorSource: `base` with the adapter in `directory`. Tensors come in the base's dtypes.

    With `exact`, tensors that it changes come in float32, so that they are rounded once, by whoever writes them. An
    adapter of a base whose vocabulary was resized has as many rows as the embedding that it carries. Raises
    CheckpointError for one that is damaged, made for another base, or not plain LoRA. Where the base ties its head to
    the embedding and the adapter changes only one of the two, the model is presented untied: that is what the adapter
    computes, while PEFT's merge_and_unload writes one shared matrix and so changes both.
    """

    def __init__(
        self, base: TensorSource, directory: str | Path, label: str | None = None, *, exact: bool = False
    ) -> None:
        self.base, self.exact = base, exact
        self.path = Path(directory)
        self.label = label or str(directory)
        self._adapter = AdapterFile.open(self.path)
        self._changes = self._adapter.changes()
        self._check_fit()
        self._drop_copies()
        self.config: ModelConfig = self._resized(self._resolve_tying())
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

    @property
    def trained_on(self) -> str | None:
        """What the adapter's configuration calls its base."""
        named = self._adapter.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, as the base's; rows of the vocabulary as the adapter has them."""
        info, change = self.base.info(self._in_base(name)), self._changes.get(name)
        if change is None:
            return info
        shape = self._adapter.shape(change.replaced) if change.replaced is not None else info.shape
        return TensorInfo(shape, torch.float32 if self.exact else info.dtype)

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

    def _replaced_or_base(self, name: str, change: Change) -> torch.Tensor:
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
        """Every change is to a tensor that the base has, and of its shape; whole vocabularies may be of other lengths."""
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
            shapes = self._shapes(change)
            if name in (EMBEDDING, HEAD) and all(found[1:] == expected[1:] for found in shapes):
                if change.replaced is None and shapes[0] != expected:
                    raise self._rows_missing(name, shapes[0][0], expected[0])
                expected = shapes[0]
            for found in shapes:
                if found != expected:
                    sizes = f"{name} should be {list(expected)}, the adapter fits {list(found)}"
                    raise CheckpointError(
                        f"{self.path}: made for another base: {sizes} (base {self.base.label})"
                    )

    def _rows_missing(self, name: str, rows: int, base_rows: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: was trained with {rows} vocabulary rows (the base has {base_rows}), but does not carry all of"
            f" {name}; save it again with save_embedding_layers=True, or name embed_tokens and lm_head in modules_to_save"
        )

    def _resized(self, config: ModelConfig) -> ModelConfig:
        """The configuration with the adapter's own number of rows. Raises CheckpointError where two would be needed."""
        heads = [] if config.tie_word_embeddings else [HEAD]
        rows = {name: self.info(name).shape[0] for name in (EMBEDDING, *heads)}
        size = rows[EMBEDDING] if EMBEDDING in self._changes else rows.get(HEAD, rows[EMBEDDING])
        if odd := next((name for name, found in rows.items() if found != size), None):
            raise self._rows_missing(odd, size, self.base.config.vocab_size)
        if size == config.vocab_size:
            return config
        return replace(config, vocab_size=size, raw={**config.raw, "vocab_size": size})

    def _shapes(self, change: Change) -> list[tuple[int, ...]]:
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
        tied = self._adapter.config.get("ensure_weight_tying") and EMBEDDING in touched
        if tied or (len(touched) == 2 and self._one_matrix()):
            self._changes.pop(HEAD, None)
            return config
        return replace(config, tie_word_embeddings=False, raw={**config.raw, "tie_word_embeddings": False})

    def _one_matrix(self) -> bool:
        """True where the adapter carries one matrix twice, as peft saves a tied embedding and head."""
        ours, theirs = self._changes[EMBEDDING], self._changes[HEAD]
        if ours.a or theirs.a or ours.replaced is None or theirs.replaced is None:
            return False
        return torch.equal(self._adapter.read(ours.replaced), self._adapter.read(theirs.replaced))
