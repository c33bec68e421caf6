"""A model as a hub directory in another shape: other shards, another type, a head of its own, fewer experts a token; or
one expert as the dense model that it is.

    export_hub(source, "out", Changes(dtype="float16", untie=True))
    member_source(source, "french")                       # a TensorSource: export it like any model

What a conversion would destroy is refused; what it merely rounds is measured, and told in the returned `Rounding`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.hub_card import front_matter
from octad.checkpoint.load import content_names, load_tokenizer
from octad.checkpoint.names import EMBEDDING, HEAD
from octad.checkpoint.narrow import narrowed
from octad.checkpoint.provenance import PROVENANCE, Provenance
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.views import ExpertView, shared_expert_adds_nothing
from octad.checkpoint.writer import CheckpointWriter
from octad.errors import RequestError
from octad.model.config import ModelConfig
from octad.staging import refuse_inputs
from octad.telling import Progress, quiet
from octad.text.tokenizer_file import check_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CARD = "README.md"
CARRIED = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Changes:
    """What is to differ; None and False: as it is. Raises RequestError for values that do not exist."""

    dtype: str | None = None
    untie: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"--dtype: found {self.dtype!r}, allowed: {', '.join(DTYPES)}")

    def config(self, source: TensorSource) -> dict[str, Any]:
        """config.json with the changes. Raises RequestError for a top-k that the model cannot have."""
        config, raw = source.config, dict(source.config.raw)
        if self.dtype is not None:
            raw["torch_dtype"] = self.dtype
            raw.pop("dtype", None)
        if self.untie:
            raw["tie_word_embeddings"] = False
        if self.top_k is not None:
            if not config.is_moe or not 1 <= self.top_k <= config.num_experts:
                raise RequestError(
                    f"--top-k: found {self.top_k}, {source.label} has {config.num_experts or 'no'} experts"
                )
            raw["num_experts_per_tok"] = self.top_k
        return raw


@dataclass
class Rounding:
    """What converting changed: how many weights of how many, how many of these to 0, and the largest change of the others
    relative to the weight."""

    weights: int = 0
    changed: int = 0
    gone: int = 0
    largest: float = 0.0

    def count(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add one tensor."""
        old, new = before.float(), after.float()
        differs = old != new
        others = differs & (new != 0)
        self.weights += old.numel()
        self.changed += int(differs.sum())
        self.gone += int(differs.sum()) - int(others.sum())
        if bool(others.any()):
            largest = float((new[others] / old[others] - 1).abs().max())
            self.largest = max(self.largest, largest)


def export_hub(
    source: TensorSource,
    directory: str | os.PathLike[str],
    changes: Changes,
    *,
    overwrite: bool = False,
    max_shard_bytes: float = 5e9,
    progress: Progress = quiet,
) -> Rounding:
    """Write the model with the changes; the directory appears whole or not at all. Returns what converting changed.

    Raises RequestError for changes that the model cannot have, CheckpointError where a value does not fit the type,
    OutputError as CheckpointWriter."""
    raw = changes.config(source)
    refuse_inputs(directory, [source.directory])
    tokenizer = load_tokenizer(source)
    check_rows(tokenizer, source.config.vocab_size, added=True)
    dtype = DTYPES[changes.dtype] if changes.dtype else None
    origins = {name: name for name in content_names(source)}
    if changes.untie and HEAD not in origins:
        origins[HEAD] = EMBEDDING
    plan = {
        name: TensorInfo(source.info(origin).shape, dtype or source.info(origin).dtype)
        for name, origin in origins.items()
    }
    rounding = Rounding()
    with CheckpointWriter(directory, plan, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
        progress("writing", 0.0)  # nothing is left to refuse
        for done, (name, origin) in enumerate(origins.items(), 1):
            if source.info(origin).dtype == plan[name].dtype:
                writer.copy(name, source, origin)
            else:
                writer.write(name, _converted(source.read(origin), plan[name].dtype, origin, rounding))
            progress("writing", done / len(origins))
        writer.add_json("config.json", raw)
        tokenizer.save(writer)
        if isinstance(source, Member):  # what lies beside the mixture speaks of the mixture
            writer.add_text(CARD, member_card(source))
        else:
            for file in (PROVENANCE, CARD):
                if source.directory is not None and (source.directory / file).is_file():
                    writer.copy_in(source.directory / file)
        writer.commit()
    return rounding


def _converted(values: torch.Tensor, dtype: torch.dtype, name: str, rounding: Rounding) -> torch.Tensor:
    converted = narrowed(values, dtype, name)
    rounding.count(values, converted)
    return converted


class Member(ExpertView):
    """An ExpertView whose config can be written as config.json."""

    @property
    def config(self) -> ModelConfig:
        """The dense family's, with the keys of its config.json."""
        config = super().config
        return replace(config, raw=dense_raw(config))


def member_source(source: TensorSource, member: str) -> Member:
    """One expert, with the shared part, as the dense model that it is. `member`: its name in octad.json, or its number.

    Raises RequestError for a dense model or a name that is not there."""
    config = source.config
    if not config.is_moe:
        raise RequestError(f"{source.label}: is dense, there is no member to take out")
    if config.sliding_window:
        raise RequestError(
            f"{source.label}: attends within {config.sliding_window} tokens; no dense family here does"
        )
    if config.family.member is None:
        raise RequestError(
            f"{source.label}: is a {config.model_type} model, whose experts no dense family here holds"
        )
    if config.shared_expert_intermediate_size and not shared_expert_adds_nothing(source):
        raise RequestError(
            f"{source.label}: has a shared expert beside the others, which a dense {config.family.member} model has no"
            " place for"
        )
    made = Provenance.of(source)
    names = made.names if made else []
    known = {name: number for number, name in enumerate(names)}
    known |= {str(number): number for number in range(config.num_experts)}
    if member not in known:
        raise RequestError(f"--member: found {member!r}, there are {', '.join(names or known)}")
    return Member(source, known[member])


def dense_raw(config: ModelConfig) -> dict[str, Any]:
    """config.json of one expert with the shared part."""
    return {
        "architectures": [config.family.architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **config.rope.to_dict(),
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.raw.get("torch_dtype", config.raw.get("dtype")),
        **{key: config.raw[key] for key in CARRIED if config.raw.get(key) is not None},
    }


def member_card(source: Member) -> str:
    """README.md of a member that was taken out of a mixture, with what it is not."""
    made = Provenance.of(source.source)
    name = made.names[source.expert] if made else f"expert {source.expert}"
    base = made.base if made else {}
    head = front_matter(["octad"], base=base.get("hub", ""), license=base.get("license", ""))
    return f"""{head}# {name}

Expert {source.expert} of `{Path(source.source.label).name}`, with the mixture's attention, norms and embeddings, as
a dense model. It is the member that went in where that member differed from the base in its feed-forward nets alone.
"""
