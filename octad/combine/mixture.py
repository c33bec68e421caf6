"""MixtureSource: the mixture before it is written, as a lazy source of its tensors.

    source = MixtureSource(config, base, members, shared=SharedSpec("base"), routers={})
    source.read("model.layers.3.block_sparse_moe.experts.5.w1.weight")     # member 5's gate projection of layer 3

Every output tensor is a pure function of a few input tensors, computed when asked for and forgotten. Writing a mixture,
fitting its routers and changing one of its experts are loops over such a source, so memory never holds more than a few
tensors, whatever the model's size.

Shapes: E experts, D model, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.extent import Extent
from octad.checkpoint.names import (
    EMBEDDING,
    HEAD,
    dense_mlp_name,
    expert_name,
    router_name,
    tensor_plan,
)
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.combine.conversion import converted
from octad.combine.recipe import SharedSpec
from octad.combine.shared import METHODS, linear
from octad.combine.token_rows import Owners
from octad.errors import CheckpointError
from octad.model.config import ModelConfig

FEW = 16  # a run of reads is slower than one: rows are read alone where the tensor has so many times more
SMALLEST_WEIGHT = 1e-12  # a row that only members of weight 0 have is theirs all the same
_INERT = re.compile(r"\.mlp\.shared_expert(_gate)?\.")


class MixtureSource:
    """E dense members over one base, seen as the checkpoint of a mixture. Routers are filled in as they are fitted."""

    def __init__(
        self,
        config: ModelConfig,
        base: TensorSource,
        members: Sequence[TensorSource],
        shared: SharedSpec,
        weights: Sequence[float] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        owners: Owners | None = None,
    ) -> None:
        self.config, self.base, self.members, self.shared, self.dtype = config, base, members, shared, dtype
        self.owners = owners or Owners.by_rows(config.vocab_size, base, members)
        total = sum(weights) if weights else 0.0
        self.weights = (
            [w / total for w in weights] if weights and total else [1 / len(members)] * len(members)
        )
        self.routers: dict[str, torch.Tensor] = {}
        self.settled: dict[str, torch.Tensor] = {}  # worked out elsewhere (regmean.py, refit.py)
        self._shapes = tensor_plan(config)
        self._origins = {
            expert_name(config.model_type, layer, e, part): (member, dense_mlp_name(layer, part))
            for layer in range(config.num_hidden_layers)
            for e, member in enumerate(members)
            for part in ("gate", "up", "down")
        }
        self._router_names = {
            router_name(config.model_type, layer) for layer in range(config.num_hidden_layers)
        }

    @property
    def label(self) -> str:
        """What messages call it."""
        return "the mixture"

    @property
    def directory(self) -> Path | None:
        """None: nothing is on disk yet."""
        return None

    def names(self) -> list[str]:
        """All tensor names; a layer's tensors are neighbours."""
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Shape, and the dtype of the mixture. Raises CheckpointError for an unknown name."""
        try:
            return TensorInfo(self._shapes[name], self.dtype)
        except KeyError:
            raise CheckpointError(f"the mixture has no tensor {name!r}") from None

    def origin(self, name: str) -> tuple[TensorSource, str] | None:
        """The one input tensor that this output tensor is a copy of, if it is one."""
        if name in self._origins:
            return self._origins[name]
        is_copy = self.shared.method == "base" and name not in self._router_names and not _INERT.search(name)
        if not is_copy or self.base.info(name).shape != self._shapes[name]:
            return None
        return None if name in (EMBEDDING, HEAD) and self.owners.added else (self.base, name)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the mixture's dtype. Raises CheckpointError for a router that is not fitted yet."""
        if name in self.settled:
            return self._converted(self.settled[name], name)
        if origin := self.origin(name):
            source, its_name = origin
            extent = source.extent(its_name)
            tensor = source.read(its_name) if extent is None else extent.read()
            return self._converted(tensor, f"{its_name} of {source.label}")
        if name in self._router_names:
            if name not in self.routers:
                raise CheckpointError(f"router {name} is not fitted yet")
            return self.routers[name].to(self.dtype)
        if _INERT.search(name):
            return torch.zeros(self._shapes[name], dtype=self.dtype)
        return self._converted(self._merged(name), name)

    def mean_of(self, name: str) -> torch.Tensor:
        """The weighted mean of the members' tensors of this name, float32."""
        return linear(
            self.base.read(name), Reads(self.members, name), self.weights, spec=self.shared, name=name
        )

    def _converted(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        return converted(tensor, self.dtype, what)

    def extent(self, name: str) -> Extent | None:
        """Where the input's bytes lie on disk, where the output is a copy of them; None elsewhere."""
        origin = None if name in self.settled else self.origin(name)
        extent = origin[0].extent(origin[1]) if origin else None
        return extent if extent and extent.info == self.info(name) else None

    def _merged(self, name: str) -> torch.Tensor:
        """A shared tensor by the recipe's method; rows of the vocabulary that only some members have, from those."""
        if name in (EMBEDDING, HEAD) and not self.owners.alike:
            return self._merged_vocabulary(name)
        base, method = self.base.read(name), METHODS[self.shared.method]
        return method(base, Reads(self.members, name), self.weights, spec=self.shared, name=name)

    def _merged_vocabulary(self, name: str) -> torch.Tensor:
        """merged_VD, row by row from those who have its token (see Owners): by the method where the base is one of them,
        the weighted mean of the others else; of a row without a token, whatever the base or the members have there."""
        merged = torch.zeros(self._shapes[name], dtype=torch.float32)
        for rows, in_base, members in self.owners.groups(self.base, self.members):
            weights = [max(self.weights[e], SMALLEST_WEIGHT) for e in members]
            shares = [weight / sum(weights) for weight in weights]
            theirs = Reads([self.members[e] for e in members], name, rows)
            if in_base:
                method = METHODS[self.shared.method]
                base = rows_of(self.base, name, rows)
                merged[rows] = (
                    method(base, theirs, shares, spec=self.shared, name=name) if members else base.float()
                )
            else:
                merged[rows] = linear(merged[rows], theirs, shares, spec=self.shared, name=name)
        return merged

    def provenance(self) -> Mapping[str, Any]:
        """Base and members, each with its own provenance."""
        return {
            "base": dict(self.base.provenance()),
            "members": [_own(member.provenance()) for member in self.members],
        }


class Reads(Sequence[torch.Tensor]):
    """One tensor of every member, or some rows, read when it is asked for: eight embeddings at once are many."""

    def __init__(self, members: Sequence[TensorSource], name: str, rows: torch.Tensor | None = None) -> None:
        self.members, self.name, self.rows = members, name, rows

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, place: Any) -> Any:
        member = self.members[place]
        return member.read(self.name) if self.rows is None else rows_of(member, self.name, self.rows)


def rows_of(source: TensorSource, name: str, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor; few of one on disk are read alone. A head tied to the embeddings is these."""
    name = EMBEDDING if source.config.tie_word_embeddings else name
    extent, (count, width) = source.extent(name), source.info(name).shape
    if extent is not None and len(rows) * FEW < count:
        return extent.blocks((rows * width).tolist(), width)
    return source.read(name)[rows]


def _own(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """A member's provenance without its base's, which is recorded once."""
    return {k: v for k, v in provenance.items() if k != "base"}
