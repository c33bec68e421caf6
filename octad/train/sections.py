"""The parts that training configs share: data, batch, optimiser, schedule, routing, evaluation. Frozen; no torch.

    DataSpec(sources=(SourceSpec(name="french", data="french.jsonl.gz"),), window=512)

Each field is a key of the YAML file; run_config.py puts them together into tasks and turns mistakes into one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from octad.checkpoint.config_file import ConfigFile, OldName, Section, StringList, distinct
from octad.evaluate.domains import Domain, inlined

Dtype = Literal["auto", "bfloat16", "float32"]


class SourceSpec(Section):
    """One domain's text: `data`, what it is read from, the `field` of a row that holds it, and how often it is drawn.
    `expert` is the member that teaches it when distilling; its own name where nothing is said."""

    old_names: ClassVar[Mapping[str, str]] = {"files": "data"}
    name: str = Field(min_length=1)
    data: StringList = Field(min_length=1)
    field: str = "text"
    weight: float = Field(default=1.0, gt=0)
    expert: str | None = None


class DataSpec(Section):
    """Where text comes from and how it is packed; `window` in tokens. `cache`: where its tokens are kept; nothing: in
    OCTAD_CACHE's or ~/.cache/octad's `tokens`."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    window: int = Field(default=512, ge=2)
    document_mask: bool = True
    append_eos: bool = True
    cache: str | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        distinct("sources", [source.name for source in self.sources])
        return self


class BatchSpec(Section):
    """`windows` a step, computed `micro` at a time (gradient accumulation); `checkpointing` recomputes activations."""

    windows: int = Field(default=8, ge=1)
    micro: int = Field(default=4, ge=1)
    checkpointing: bool = False


class OptimizerSpec(Section):
    """`lr` at the top of the schedule. muon takes the matrices inside the layers, AdamW the rest. Routers, norms and
    biases do not decay; `router_lr` is the routers' own rate."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    router_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)


class ScheduleSpec(Section):
    """Learning rate over the steps: `warmup` steps up (where not said 10, of a short run at most half), then down to
    `final` of the top. wsd: warm-up, stable, then a linear decay over the last `decay` of all steps."""

    name: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: int | None = Field(default=None, ge=0)
    final: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.2, gt=0, le=1)

    def rise(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return min(10, steps // 2) if self.warmup is None else self.warmup


class RoutingSpec(Section):
    """How routers learn. balance, z: weights of the two losses; bias: step of the auxiliary-loss-free bias, which fades
    to nothing over the last tenth of the steps; jitter: noise on the routers' inputs; sample: draw experts instead of
    taking the best; capacity: most tokens an expert takes, as a multiple of its fair share (None: dropless);
    top1: the gradient of a single expert's weight."""

    balance: float = Field(default=0.0, ge=0)
    z: float = Field(default=0.0, ge=0)
    bias: float = Field(default=0.0, ge=0)
    jitter: float = Field(default=0.0, ge=0, lt=1)
    sample: bool = False
    capacity: float | None = Field(default=None, gt=0, le=1e6)
    top1: Literal["straight-through", "switch"] = "straight-through"


class LowRankSpec(Section):
    """Low-rank changes: B A * alpha / rank."""

    rank: int = Field(default=16, ge=1, le=1 << 16)
    alpha: float = Field(default=32.0, gt=0)


class RepairSpec(LowRankSpec):
    """What `repair` changes besides routers and norms; `experts`: each expert's own networks too, by the same rank."""

    experts: bool = True


class EvaluateSpec(Section):
    """Held-out text: `tokens` of each domain every `every` steps and at the end. `domains`: a file of them
    (domains.yaml, as `octad evaluate` takes it), or what stands in one; `field`: the column where a domain names none."""

    domains: Annotated[
        dict[str, Domain], BeforeValidator(inlined, json_schema_input_type=str | dict[str, Domain])
    ] = Field(default_factory=dict)
    field: str = "text"
    every: int = Field(default=100, ge=1)
    tokens: int = Field(default=4096, ge=2)
    window: int = Field(default=512, ge=2)


class SaveSpec(Section):
    """A checkpoint to resume from every `every` steps; the newest `keep` stay. asynchronous: it is written while the
    next steps run, from a copy in memory (auto: on GPUs, whose copy does not compete with the steps)."""

    every: int = Field(default=100, ge=1)
    keep: int = Field(default=2, ge=1)
    asynchronous: bool | Literal["auto"] = "auto"


class ParallelSpec(Section):
    """How weights lie on many processes. shard: each holds a part of every weight and moment (FSDP); expert: so many
    processes share the experts of a layer. auto: only where one process's memory would be more than half full.
    One process alone holds everything."""

    shard: bool | Literal["auto"] = "auto"
    expert: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class RunSpec(ConfigFile):
    """What every task has. `spike`: stop where a step's loss is this many times the running mean (0: never). `compile`:
    torch.compile for the small operations; auto: on GPUs, where the run is long enough and it can be done."""

    steps: int = Field(ge=1)
    batch: BatchSpec = BatchSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    save: SaveSpec = SaveSpec()
    parallel: ParallelSpec = ParallelSpec()
    log_every: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    dtype: Dtype = "auto"
    compile: Literal["auto", True, False] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    spike: float = Field(default=3.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch.windows % min(self.batch.micro, self.batch.windows):
            raise ValueError(
                f"batch.windows {self.batch.windows} is no multiple of batch.micro {self.batch.micro}"
            )
        if (rise := self.schedule.rise(self.steps)) > self.steps:
            raise ValueError(f"schedule.warmup {rise} is more than steps {self.steps}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default spelt out; what two runs are compared by."""
        return self.model_dump(mode="json")

    def as_now(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What to_dict told when a state was saved, in the keys that there are now; as it is where it cannot be read."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OldName)
            try:
                return type(self).model_validate(saved).to_dict()
            except ValidationError:
                return saved
