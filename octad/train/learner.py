"""What a task trains: a model prepared for it, the parameters that learn, and how the result is written.

    learner = tune_learner(config)                # an existing mixture: router | repair | all
    learner.trainable                             # name -> parameter; everything else is frozen
    learner.write(run, masters)                   # a normal checkpoint

A trainer knows nothing of modes: a mode is a choice of parameters and modules made here, before the first step. Frozen
weights take part in the forward pass only; their gradients are never computed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from octad.checkpoint.hub_card import CARD, front_matter, hub_facts
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.provenance import PROVENANCE, Provenance
from octad.checkpoint.source import TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.dist import World, compute_dtype, own_device
from octad.errors import CheckpointError, RecipeError, did_you_mean
from octad.evaluate.card import without_verdict
from octad.fast.grouped_experts import group_experts
from octad.fast.pieces import Piece
from octad.fast.training_experts import TrainExperts
from octad.fast.weights import Fill, bare_model, fill_from, materialise
from octad.guard import read_json
from octad.model.moe import Experts, MoE
from octad.model.transformer import Transformer
from octad.text.tokenizer import Tokenizer
from octad.train.export import Changes, common_files, write_trained
from octad.train.lowrank import add_low_rank, low_rank_deltas
from octad.train.routers import TrainRouter, swap_routers
from octad.train.run_config import TuneConfig
from octad.train.sections import DataSpec, EvaluateSpec, RoutingSpec, RunSpec

TRAINING = "training.json"
ATTENTION = r"self_attn\.[qkvo]_proj$"
SHARED = rf"{ATTENTION}|embed_tokens$|lm_head$"
EXPERTS = r"mlp\.experts$"
NORM = r"norm\.weight$"


@dataclass
class Learner:
    """A task, ready to train. `write` takes the run's directory, this rank's float32 masters by parameter name, and the
    ranks; `identity` tells which weights it started from; `members` are the experts' names; `result` is the file that
    says it is done; `fill` brings the weights once they are laid out, where the model has none yet; `notes` are told
    before the first step."""

    model: Transformer
    tokenizer: Tokenizer
    config: RunSpec
    data: DataSpec
    evaluate: EvaluateSpec
    write: Callable[[Path, Mapping[str, torch.Tensor], World], Path]
    trainable: dict[str, nn.Parameter] = field(default_factory=dict)
    routers: list[TrainRouter] = field(default_factory=list)
    routing: RoutingSpec = field(default_factory=RoutingSpec)
    identity: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    teacher: Transformer | None = None
    distill: float = 0.0
    result: str = "config.json"
    fill: Fill | None = None
    notes: tuple[str, ...] = ()

    def bring_weights(
        self, device: torch.device | str = "cpu", pieces: Mapping[str, Piece] = MappingProxyType({})
    ) -> Transformer:
        """The model with its weights, this rank's `pieces` of them, on `device`."""
        if self.fill is not None:
            self.fill(self.model, materialise(self.model, torch.device(device)), pieces)
        return self.model


def compute_settings(config: RunSpec) -> tuple[torch.dtype, torch.device]:
    """Where and in which precision the model computes: of torchrun's processes, each on a GPU of its own. Raises
    RecipeError for a GPU that is not there."""
    own = own_device()
    device = own if config.device in ("auto", own.type) else torch.device(config.device)
    if device.type == "cuda" and own.type == "cpu":
        raise RecipeError(f"device: {config.device} is asked for, but PyTorch sees no GPU here")
    dtype = compute_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    return dtype, device


def tune_learner(config: TuneConfig) -> Learner:
    """An existing mixture. Raises RecipeError for a dense model or a source that names no member to learn from."""
    source = open_source(config.resolve(config.model))
    if not source.config.is_moe:
        raise RecipeError(
            f"{source.label}: is dense, there is nothing to tune; `octad branch` trains dense models"
        )
    dtype, device = compute_settings(config)
    # a teacher stays whole on every rank, and shares with the model what the mode leaves alone
    model = load_model(source, dtype, device) if config.distill else bare_model(source.config, dtype)
    model.requires_grad_(False)
    provenance, earlier = Provenance.of(source), _earlier(source)
    members = tuple(provenance.names) if provenance else ()
    teacher = _teacher(model, config) if config.distill else None
    if teacher is not None:
        _check_members(config, members)
    routers = prepare_mixture(model, config.routing, device)
    torch.manual_seed(config.seed)
    if config.mode == "repair":
        pattern = rf"{SHARED}|{EXPERTS}" if config.low_rank.experts else SHARED
        add_low_rank(model, pattern, config.low_rank, device)
    learner = Learner(
        model=model,
        tokenizer=load_tokenizer(source),
        config=config,
        data=config.data,
        evaluate=config.evaluate,
        write=lambda run, values, world: _write_tuned(
            run, source, changes_of(model, values), config, provenance, earlier, world
        ),
        trainable=_trainable(model, config.mode),
        routers=routers,
        routing=config.routing,
        identity={"files": source.provenance().get("files")},
        members=members,
        teacher=teacher,
        distill=config.distill,
        fill=fill_from(source),
        notes=tuple(_strangers(config, members)),
    )
    return learner


def prepare_mixture(
    model: Transformer, routing: RoutingSpec, device: torch.device | str = "cpu"
) -> list[TrainRouter]:
    """Swap routers and experts for those that train; returns the routers. On a GPU experts are grouped products."""
    routers = swap_routers(model, routing)
    if torch.device(device).type == "cuda":
        group_experts(model)
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE) and isinstance(layer.mlp.experts, Experts):
            layer.mlp.experts = TrainExperts(layer.mlp.experts)
    return routers


def choose(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Let exactly the parameters learn whose names the pattern is found in."""
    chosen = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def by_hub_parameter(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masters that stand for whole parameters, without low-rank factors."""
    return {name: value for name, value in values.items() if "lora_" not in name}


def changes_of(model: Transformer, values: Mapping[str, torch.Tensor]) -> Changes:
    """What the masters mean for the checkpoint that the model came from."""
    return Changes(by_hub_parameter(values), low_rank_deltas(model, dict(values)))


def _trainable(model: Transformer, mode: str) -> dict[str, nn.Parameter]:
    patterns = {"router": r"mlp\.gate\.", "repair": rf"mlp\.gate\.|lora_|{NORM}", "all": ""}
    return choose(model, patterns[mode])


def _teacher(model: Transformer, config: TuneConfig) -> Transformer:
    """The mixture as it is now; what the mode leaves alone is shared with the model that learns."""
    own = {"router": "^$", "repair": NORM, "all": ""}[config.mode]
    shared = {id(p): p for name, p in model.named_parameters() if not re.search(own, name)}
    return copy.deepcopy(model, dict(shared)).requires_grad_(False).eval()


def _strangers(config: TuneConfig, members: tuple[str, ...]) -> Iterator[str]:
    """A line for each source that names no expert: it is learnt from all the same."""
    for source in config.data.sources if members else ():
        if (expert := source.expert or source.name) not in members:
            hint = did_you_mean(expert, members) or f"there are {', '.join(members)}"
            yield f"data source {source.name!r} names no expert of the mixture ({hint}); it is learnt from all the same"


def _check_members(config: TuneConfig, members: tuple[str, ...]) -> None:
    for source in config.data.sources:
        if (expert := source.expert or source.name) not in members:
            raise RecipeError(
                f"data source {source.name!r}: no expert {expert!r} to distil from (experts: {', '.join(members)}); "
                "set its expert:"
            )


def _write_tuned(
    run: Path,
    source: TensorSource,
    changes: Changes,
    config: TuneConfig,
    provenance: Provenance | None,
    earlier: list[Any],
    world: World,
) -> Path:
    def side_files(writer: CheckpointWriter) -> None:
        common_files(writer, source.config.raw, load_tokenizer(source))
        writer.add_text(CARD, tuned_card(source, config))
        record = config.to_dict() | {"trained": source.label}
        writer.add_json(TRAINING, [*earlier, record])
        if provenance is not None:
            provenance.edits.append(f"trained ({config.mode}, {config.steps} steps)")
            writer.add_text(PROVENANCE, provenance.to_json())

    return write_trained(run, source, changes, side_files, world)


def tuned_card(source: TensorSource, config: TuneConfig) -> str:
    """README.md: what the mixture's own says, without a verdict on what it was, and what was done to it."""
    path = source.directory / CARD if source.directory is not None else None
    before = path.read_text("utf-8", "replace") if path is not None and path.is_file() else ""
    if not before:
        before = front_matter(["moe", "octad"], **_hub(source)) + f"# {Path(source.label).name}\n"
    learnt = {
        "router": "the routers",
        "repair": "routers, norms and low-rank changes of the rest",
        "all": "all weights",
    }
    texts = "\n".join(
        f"- {s.name}: {', '.join(Path(file).name for file in s.data)}" for s in config.data.sources
    )
    return f"""{without_verdict(before).rstrip()}

## Trained further

`octad train`, mode `{config.mode}` ({learnt[config.mode]}): {config.steps:,} steps of
{config.batch.windows * config.data.window:,} tokens, at most {config.optimizer.lr:g} learning rate. Settings are in
`{TRAINING}`. Text:

{texts}
"""


def _hub(source: TensorSource) -> dict[str, str]:
    facts = hub_facts(source)
    return {"base": facts.get("hub", ""), "relation": "finetune", "license": facts.get("license", "")}


def _earlier(source: TensorSource) -> list[Any]:
    """How the source was trained, where it was. Raises CheckpointError for a damaged file."""
    path = source.directory / TRAINING if source.directory is not None else None
    if path is None or not path.is_file():
        return []
    if not isinstance(found := read_json(path), list):
        raise CheckpointError(f"{path}: should hold a list, found {type(found).__name__}; remove it")
    return found
