"""What to train, how, on what: YAML files read into frozen sections. Imports no torch.

    task: tune                                   # tune.yaml: an existing mixture
    model: mixture/
    mode: repair                                 # router | repair | all
    steps: 200
    data:
      window: 512
      sources: [{name: french, data: french.jsonl.gz}, {name: python, data: python.jsonl.gz}]

    load_config("tune.yaml") -> TuneConfig; load_branch("branch.yaml") -> BranchConfig

Paths are relative to the file. Every mistake is one line that names the file, the key and, for a misspelt key, the
nearest one that exists; `unused_keys` tells which settings the chosen mode does not look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from octad.checkpoint.config_file import Section, StringList, distinct, read_mapping
from octad.errors import RecipeError
from octad.evaluate.domains import DomainSpec
from octad.train.sections import (
    DataSpec,
    EvaluateSpec,
    LowRankSpec,
    RepairSpec,
    RoutingSpec,
    RunSpec,
    SourceSpec,
)

TuneMode = Literal["router", "repair", "all"]
BranchMode = Literal["ffn-adapter", "adapter", "ffn", "full"]


class TuneConfig(RunSpec):
    """Go on with an existing mixture. `distill`: weight of the member's own prediction against the text's next token."""

    task: Literal["tune"]
    model: str = Field(min_length=1)
    mode: TuneMode = "repair"
    data: DataSpec
    routing: RoutingSpec = RoutingSpec()
    low_rank: RepairSpec = RepairSpec()
    distill: float = Field(default=0.0, ge=0, le=1)

    def unused_keys(self) -> Iterator[str]:
        """Settings that this mode does not look at."""
        yield from _unused_common(self)
        if self.mode != "repair" and "low_rank" in self.model_fields_set:
            yield f"low_rank (mode {self.mode!r} has no low-rank changes)"


class ArchitectureSpec(Section):
    """A model from nothing. `size` is the one dial: layers = size, width = 64 * size, heads of 64; the rest follows and
    can be set by hand. A mixture's experts are as wide as makes its active cost the dense twin's."""

    size: int = Field(ge=1)
    layers: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=8)
    heads: int | None = Field(default=None, ge=1)
    feed_forward: int | None = Field(default=None, ge=1)
    num_experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    tie_embeddings: bool = True


class PretrainConfig(RunSpec):
    """A model from scratch, dense or its mixture twin; `upcycle`: a dense run whose weights every expert starts from."""

    task: Literal["pretrain"]
    mode: Literal["dense", "mixture"]
    architecture: ArchitectureSpec
    tokenizer: str = Field(min_length=1)
    data: DataSpec
    routing: RoutingSpec = RoutingSpec(balance=1e-2)
    upcycle: str | None = None

    def unused_keys(self) -> Iterator[str]:
        """Settings that this mode does not look at."""
        yield from _unused_common(self)
        if self.mode == "dense":
            sections = {"routing": self, "upcycle": self, "num_experts": self.architecture}
            yield from (f"{k} (mode 'dense')" for k, s in sections.items() if k in s.model_fields_set)


class SpecialistSpec(Section):
    """One specialist: its name, the text it is made of, held-out text, and steps where not the common ones; `start`: an
    adapter of the same base to go on from."""

    old_names: ClassVar[Mapping[str, str]] = {"files": "data"}
    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    data: StringList = Field(min_length=1)
    field: str = "text"
    held_out: StringList = ()
    steps: int | None = Field(default=None, ge=1)
    start: str | None = None


class BranchDataSpec(Section):
    """How the specialists' text is packed; see DataSpec."""

    window: int = Field(default=512, ge=2)
    document_mask: bool = True
    append_eos: bool = True
    cache: str | None = None


class RaySpec(Section):
    """What `octad branch --ray` asks for. address: a cluster's (else RAY_ADDRESS's, else one is started here for the
    time of the command); processes: of each specialist, which train it together; cpus, gpus: of each process (auto: one
    GPU where the cluster has any)."""

    address: str | None = None
    processes: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"


class KeepSpec(Section):
    """Text of what no specialist is to unlearn, such as the base's own answers: this `share` of all windows is of it."""

    data: StringList = Field(min_length=1)
    field: str = "text"
    share: float = Field(default=0.25, gt=0, lt=1)


class BranchConfig(RunSpec):
    """One base, N specialists. `keep`: what each of them reads besides its own text. `retries`: of a specialist that
    stopped itself, or whose worker was lost."""

    old_names: ClassVar[Mapping[str, str]] = {"specialists": "experts"}
    base: str = Field(min_length=1)
    mode: BranchMode = "ffn-adapter"
    experts: tuple[SpecialistSpec, ...] = Field(min_length=1)
    data: BranchDataSpec = BranchDataSpec()
    keep: KeepSpec | None = None
    low_rank: LowRankSpec = LowRankSpec()
    ray: RaySpec = RaySpec()
    retries: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        distinct("experts", [s.name for s in self.experts])
        if short := next(
            (s for s in self.experts if s.steps and self.schedule.rise(s.steps) > s.steps), None
        ):
            raise ValueError(
                f"schedule.warmup {self.schedule.warmup} is more than steps {short.steps} of {short.name}"
            )
        return self

    def unused_keys(self, ray: bool = False) -> Iterator[str]:
        """Settings that this mode does not look at, with `--ray` or without."""
        if not ray and "ray" in self.model_fields_set:
            yield "ray (without --ray specialists are trained in turn, here)"
        held_out = any(specialist.held_out for specialist in self.experts)
        yield from (k for k in _unused_common(self) if not (held_out and k.startswith("evaluate")))
        if self.mode in ("ffn", "full") and "low_rank" in self.model_fields_set:
            yield f"low_rank (mode {self.mode!r} has no low-rank changes)"

    def data_of(self, specialist: SpecialistSpec) -> DataSpec:
        """What a specialist learns from: its own text, and what all of them keep."""
        own = SourceSpec(name=specialist.name, data=specialist.data, field=specialist.field)
        if self.keep is None:
            return DataSpec(sources=(own,), **self.data.model_dump())
        kept = SourceSpec(
            name=f"{specialist.name}: kept",
            data=self.keep.data,
            field=self.keep.field,
            weight=self.keep.share,
        )
        own = own.model_copy(update={"weight": 1 - self.keep.share})
        return DataSpec(sources=(own, kept), **self.data.model_dump())

    def evaluation_of(self, specialist: SpecialistSpec) -> EvaluateSpec:
        """The common held-out domains and the specialist's own."""
        text = {"data": specialist.held_out, "field": specialist.field}
        own = {specialist.name: DomainSpec.model_validate(text)} if specialist.held_out else {}
        return self.evaluate.model_copy(update={"domains": self.evaluate.domains | own})


TrainConfig = TuneConfig | PretrainConfig
TASKS: dict[str, type[TuneConfig] | type[PretrainConfig]] = {"tune": TuneConfig, "pretrain": PretrainConfig}


def load_config(path: str | Path) -> TrainConfig:
    """A file for `octad train`. Raises RecipeError with one line for whatever is wrong."""
    return _train_config(_read(Path(path)), Path(path).parent, str(path))


def load_branch(path: str | Path) -> BranchConfig:
    """A file for `octad branch`. Raises RecipeError with one line for whatever is wrong."""
    return BranchConfig.from_dict(_read(Path(path)), Path(path).parent, str(path))


def config_of(config: str | Path | Mapping[str, Any]) -> TrainConfig:
    """The same of a file, or of plain data, whose paths are relative to the current directory."""
    return _train_config(config, Path(), "config") if isinstance(config, Mapping) else load_config(config)


def branch_of(config: str | Path | Mapping[str, Any]) -> BranchConfig:
    """As load_branch, or of plain data, whose paths are relative to the current directory."""
    if isinstance(config, Mapping):
        return BranchConfig.from_dict(config, Path(), "config")
    return load_branch(config)


def _train_config(raw: Mapping[str, Any], directory: Path, label: str) -> TrainConfig:
    experts = raw.get("experts")
    if isinstance(experts, list) and any(isinstance(e, Mapping) and "model" in e for e in experts):
        raise RecipeError(f"{label}: names members that are there already: it is for `octad combine`")
    if "specialists" in raw or ("experts" in raw and "task" not in raw):
        raise RecipeError(f"{label}: has specialists to make: it is for `octad branch`")
    if (kind := TASKS.get(str(raw.get("task")))) is None:
        raise RecipeError(f"{label}: task must be tune or pretrain, found {raw.get('task')!r}")
    return kind.from_dict(raw, directory, label)


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path, str(path), "data and steps")


def _unused_common(config: RunSpec) -> Iterator[str]:
    optimizer, schedule = config.optimizer, config.schedule
    if optimizer.name != "muon" and "momentum" in optimizer.model_fields_set:
        yield "optimizer.momentum (only muon has one)"
    if schedule.name != "wsd" and "decay" in schedule.model_fields_set:
        yield "schedule.decay (only wsd has one)"
    if schedule.name == "constant" and "final" in schedule.model_fields_set:
        yield "schedule.final (the schedule is constant)"
    if not config.evaluate.domains and config.evaluate.model_fields_set:
        yield "evaluate (no domains are given)"
