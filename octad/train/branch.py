"""One base, N data sets, N specialists: independent runs, one after another, each resumable alone.

    branch(config, Path("specialists"), echo=print, only="french")       # one after another; fanout.py: over Ray

Modes: ffn-adapter (low-rank on the feed-forward networks; attention stays the base's, so that `shared: base` combines
them exactly), adapter (low-rank on all linear layers), ffn (the feed-forward networks themselves), full. Adapters are
PEFT directories, the others checkpoints; either is a member for `octad combine`. A specialist that fails is tried again
from its last state, then left, so that it does not take the others with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.load import load_tokenizer, open_member, open_source
from octad.checkpoint.lora import AdapterSource
from octad.checkpoint.names import PARTS
from octad.checkpoint.provenance import found_at
from octad.checkpoint.source import TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.dist import World
from octad.errors import OctadError, RecipeError
from octad.fast.weights import bare_model, fill_from
from octad.model.transformer import Transformer
from octad.telling import Progress, quiet
from octad.train.export import Changes, common_files, write_adapter, write_trained
from octad.train.learner import Learner, changes_of, choose, compute_settings
from octad.train.lowrank import add_low_rank, low_rank_deltas, start_from
from octad.train.run_config import BranchConfig, SpecialistSpec
from octad.train.trainer import Outcome, Trainer, TrainingStopped

FFN_TARGETS = tuple(f"{part}_proj" for part in PARTS)
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", *FFN_TARGETS)
LEARNING = {"ffn-adapter": "lora_", "adapter": "lora_", "ffn": r"\.mlp\.", "full": ""}


def branch(
    config: BranchConfig,
    output: Path,
    *,
    echo: Callable[[str], None],
    progress: Progress = quiet,
    only: str | None = None,
) -> Outcome:
    """Train all specialists that are not finished yet, or `only` one. `progress` gets a name and the share done, 0 to 1.
    Raises TrainingStopped naming those that failed."""
    failed: dict[str, str] = {}
    for specialist in chosen(config, only):
        try:
            outcome = train_specialist(config, specialist, output, echo, progress)
        except OctadError as error:
            echo(f"{specialist.name}: failed: {error}")
            failed[specialist.name] = str(error)
            continue
        if outcome is Outcome.STOPPED:
            return outcome
    raise_failed(failed)
    return Outcome.FINISHED


def chosen(config: BranchConfig, only: str | None) -> list[SpecialistSpec]:
    """The specialists to train. Raises RecipeError for a name that is none of them."""
    found = [s for s in config.experts if only is None or s.name == only]
    if not found:
        names = ", ".join(s.name for s in config.experts)
        raise RecipeError(f"--only {only}: no such specialist (there are {names})")
    return found


def raise_failed(failed: Mapping[str, str]) -> None:
    """Raises TrainingStopped where there are any: name -> why."""
    if failed:
        first = next(iter(failed.values()))
        many = "1 specialist" if len(failed) == 1 else f"{len(failed)} specialists"
        raise TrainingStopped(f"{many} failed ({', '.join(failed)}); the first: {first}")


def train_specialist(
    config: BranchConfig,
    specialist: SpecialistSpec,
    output: Path,
    echo: Callable[[str], None],
    progress: Progress,
    stops: Callable[[], bool] = lambda: False,
) -> Outcome:
    """One of them, in a directory of its name; a run that stops itself is tried again. `stops` is asked before each step.
    Raises OctadError."""
    for left in reversed(range(config.retries + 1)):
        gc.collect()  # a trainer holds itself in circles: the model before this one goes now, not some time
        try:
            return _train(config, specialist, output / specialist.name, echo, progress, stops)
        except TrainingStopped as error:
            if not left:
                raise
            echo(f"{specialist.name}: {error}; trying again from its last state")
    raise AssertionError("unreachable")


def branch_learner(config: BranchConfig, specialist: SpecialistSpec) -> Learner:
    """One specialist. Raises RecipeError where the base is a mixture."""
    source = open_source(config.resolve(config.base))
    if source.config.is_moe:
        raise RecipeError(f"{source.label}: is a mixture; specialists branch off a dense base")
    dtype, device = compute_settings(config)
    model = bare_model(source.config, dtype)
    adapter = config.mode in ("ffn-adapter", "adapter")
    targets = FFN_TARGETS if config.mode == "ffn-adapter" else ALL_TARGETS
    if adapter:
        torch.manual_seed(config.seed)
        add_low_rank(model, rf"({'|'.join(targets)})$", config.low_rank, device)
    started = _start(config, specialist, source, model, adapter=adapter)

    def write(run: Path, values: Mapping[str, torch.Tensor], world: World) -> Path:
        if adapter:
            deltas = low_rank_deltas(model, dict(values))
            return write_adapter(run, found_at(source.label), deltas, config.low_rank, targets, world)
        return _write_full(run, source, changes_of(model, values), world)

    steps = specialist.steps or config.steps
    data = config.data_of(specialist)
    text = [file for part in data.sources for file in part.data]
    return Learner(
        model=model,
        tokenizer=load_tokenizer(source),
        config=config.model_copy(update={"steps": steps}),
        data=data,
        evaluate=config.evaluation_of(specialist),
        write=write,
        trainable=choose(model, LEARNING[config.mode]),
        identity={"files": source.provenance().get("files"), "text": text} | started,
        result="adapter_config.json" if adapter else "config.json",
        fill=fill_from(source),
    )


def _start(
    config: BranchConfig, specialist: SpecialistSpec, base: TensorSource, model: Transformer, *, adapter: bool
) -> dict[str, Any]:
    """Go on from the specialist's `start`, and what to remember of it. Raises RecipeError where it cannot be one."""
    if specialist.start is None:
        return {}
    if not adapter:
        raise RecipeError(f"{specialist.name}: start goes on from an adapter; mode {config.mode!r} has none")
    member = open_member(config.resolve(specialist.start), base)
    if not isinstance(member, AdapterSource):
        raise RecipeError(f"{specialist.start}: is no adapter; start goes on from one")
    start_from(model, member)
    return {"start": member.provenance()["files"]}


def _train(
    config: BranchConfig,
    specialist: SpecialistSpec,
    run: Path,
    echo: Callable[[str], None],
    progress: Progress,
    stops: Callable[[], bool],
) -> Outcome:
    name = specialist.name
    trainer = Trainer(branch_learner(config, specialist), run, lambda line: echo(f"{name}: {line}"))
    if trainer.finished:
        echo(f"{name}: finished earlier ({trainer.step} steps)")
        progress(name, 1.0)
        return Outcome.FINISHED
    trainer.progress, trainer.stops = lambda done: progress(name, done), stops
    return trainer.fit()


def _write_full(run: Path, source: TensorSource, changes: Changes, world: World) -> Path:
    def side_files(writer: CheckpointWriter) -> None:
        common_files(writer, source.config.raw, load_tokenizer(source))

    return write_trained(run, source, changes, side_files, world)
