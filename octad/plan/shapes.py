"""What is planned: a model by name, config.json, checkpoint, recipe or hub id, as one or more readings of its size.

    for reading in readings("8x220b"): reading.label, reading.parameters, reading.active

A reading is a config, or several copies of one of which a token uses some: "8 x 220 B" may mean eight whole models
side by side (nothing shared), or eight experts around one attention stack.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from octad.checkpoint.config_file import read_mapping
from octad.errors import CheckpointError, ConfigError, RecipeError, nearest
from octad.guard import exists, read_object
from octad.model import cost
from octad.model.config import ModelConfig, dense_config
from octad.model.families import FAMILIES, INERT_SHARED_EXPERT

Opened = Callable[[str], ModelConfig]


@dataclass(frozen=True)
class Reading:
    """`copies` models of one config, of which a token passes through `used`."""

    label: str
    config: ModelConfig
    copies: int = 1
    used: int = 1
    note: str = ""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.copies * cost.parameters(self.config)

    @property
    def active(self) -> int:
        """What one token passes through."""
        return self.used * cost.parameters(self.config, active=True)

    def flops_per_token(self, context: int) -> float:
        """Forward pass of one token."""
        return self.used * float(cost.flops_per_token(self.config, context))


@functools.cache
def _named() -> Mapping[str, Any]:
    found = yaml.safe_load((files("octad.plan") / "shapes.yaml").read_text(encoding="utf-8"))
    return dict(found)


def readings(
    target: str, experts: int | None = None, top_k: int | None = None, opened: Opened | None = None
) -> list[Reading]:
    """Every way to read the target's size. `experts`: a mixture of so many of a dense model, `top_k` of them a token;
    `opened`: gives the config of what only a checkpoint's reader understands, GGUF files and bundled bases. Raises
    RecipeError, ConfigError, CheckpointError."""
    found = _read(target, opened)
    if experts is not None:
        found = replace(found, config=upcycled(found.config, experts, top_k or min(2, experts), target))
    elif top_k is not None:
        found = replace(found, config=_with_top_k(found.config, top_k, target))
    if not _named().get(target.lower(), {}).get("assumed"):
        return [found]
    dense = dense_config(found.config)
    shared = replace(found, label=f"{target}, attention shared")
    copies, used = found.config.num_experts, found.config.num_experts_per_tok
    return [Reading(f"{target}, nothing shared", dense, copies, used, found.note), shared]


def upcycled(base: ModelConfig, experts: int, top_k: int, label: str) -> ModelConfig:
    """The mixture of so many copies of a dense model. Raises ConfigError."""
    if base.is_moe:
        raise ConfigError(f"{label}: is a mixture already; --experts is for dense models")
    target = FAMILIES[base.model_type].mixture
    if target is None or not 1 <= top_k <= experts:
        raise ConfigError(f"{label}: no mixture of {experts} experts with top-{top_k} can be made of it")
    return replace(
        base,
        model_type=target,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=base.intermediate_size,
        shared_expert_intermediate_size=INERT_SHARED_EXPERT if FAMILIES[target].shared_expert else 0,
    )


def _with_top_k(config: ModelConfig, top_k: int, label: str) -> ModelConfig:
    if not config.is_moe or not 1 <= top_k <= config.num_experts:
        raise ConfigError(f"{label}: top-{top_k} is not possible with {config.num_experts} experts")
    return replace(config, num_experts_per_tok=top_k)


def _read(target: str, opened: Opened | None) -> Reading:
    if (named := _named().get(target.lower())) is not None:
        return Reading(target, ModelConfig.from_dict(named["config"]), note=named.get("note", ""))
    if not target.strip():
        raise RecipeError(
            f"the model is empty; give a name ({', '.join(_named())}), a checkpoint, a recipe or a hub id"
        )
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path, opened)
    if exists(path) and path.suffix != ".gguf":
        return Reading(target, _of_file(path / "config.json" if path.is_dir() else path))
    if (
        target.count("/") == 1
        and not target.startswith((".", "/", "~"))
        and path.suffix not in (".gguf", ".json")
    ):
        return Reading(target, _of_hub(target))
    near = nearest(target.lower(), _named(), cutoff=0.6)
    if opened is not None and near is None:
        return Reading(target, opened(target))
    hint = f"did you mean {near!r}?" if near else f"known names: {', '.join(_named())}"
    raise RecipeError(f"{target}: is no file, no checkpoint and no model known by name; {hint}")


def _of_file(path: Path) -> ModelConfig:
    raw = read_object(path)
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _of_hub(name: str) -> ModelConfig:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it tells of every attempt to connect
    try:
        return _of_file(Path(hf_hub_download(name, "config.json")))
    except (
        OSError,
        ValueError,
    ) as error:  # not there, not allowed, or no network: all of the hub's errors are OSErrors
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name}: no config.json from the hub: {line}") from None
    finally:
        logging.set_verbosity(before)


def _of_recipe(path: Path, opened: Opened | None) -> Reading:
    """The mixture that a recipe would make: its base's shape, and as many experts as it lists."""
    raw = read_mapping(path, f"recipe {path}", "base and experts")
    base, experts = raw.get("base"), raw.get("experts")
    if not isinstance(base, str) or not isinstance(experts, list) or len(experts) < 2:
        raise RecipeError(f"recipe {path}: expected a base and at least two experts")
    beside = path.parent / Path(base).expanduser()
    dense = _read(str(beside) if exists(beside) else base, opened).config
    top_k = raw.get("top_k", 2)
    if type(top_k) is not int:
        raise RecipeError(f"recipe {path}: top_k must be a whole number, found {top_k!r}")
    return Reading(str(path), upcycled(dense, len(experts), top_k, str(path)))
