"""A trained model as a normal checkpoint: what did not change is copied byte for byte, what did is converted once.

    changes = Changes(values={"model.norm.weight": tensor}, deltas={"model...q_proj.weight": (A, B, scale)})
    write_trained(run, source, changes, side_files)

A low-rank change is added in float32 to the weights as they are on disk, so that only one rounding separates the file
from the sum. Every rank writes the rows that it holds, straight to their places; no weight is put together anywhere. The
run's directory already holds its log and states; the model is written whole beside them, then moved in with config.json
last, so that a run that is cut short never looks like a model.

Shapes: E experts, F feed-forward hidden, D model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save
from torch.distributed.tensor import DTensor

from octad import staging
from octad.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from octad.checkpoint.load import content_names
from octad.checkpoint.names import tensor_plan
from octad.checkpoint.row_writer import RowWriter
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.spans import Parts
from octad.checkpoint.writer import CheckpointWriter
from octad.dist import World
from octad.fast.pieces import first_of_copies, local, place_of, whole
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory, explained
from octad.text.tokenizer import Tokenizer
from octad.train.lowrank import Factors
from octad.train.sections import LowRankSpec

_STAGING = "model-in-the-making"
ALONE = World()


@dataclass(frozen=True)
class Changes:
    """By parameter of the Transformer: new values, or a low-rank delta on what is on disk."""

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Factors] = field(default_factory=dict)


def write_trained(
    run: Path,
    source: TensorSource,
    changes: Changes,
    side_files: Callable[[CheckpointWriter], None],
    world: World = ALONE,
) -> Path:
    """Write the source with the changes into a run's directory. Raises OutputError where it cannot be written."""
    plan = {name: source.info(name) for name in content_names(source)}
    parts = Parts(source.config)
    mine = _own_factors(parts, changes.deltas, world)
    changed = {name for p in (*changes.values, *changes.deltas) for name in parts.sources[p]}

    def fill(rows: RowWriter) -> None:
        _write_values(rows, parts, changes.values, world)
        for name, (a, b, scale) in mine:
            rows.write(name, 0, source.read(name).float().addmm_(b.cpu(), a.cpu(), alpha=scale))
        rows.copy_all(world.every([name for name in plan if name not in changed]), source)

    return _write(run, plan, fill, side_files, world)


def write_new(
    run: Path,
    config: ModelConfig,
    values: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    side_files: Callable[[CheckpointWriter], None],
    world: World = ALONE,
) -> Path:
    """Write a model that has no source, every parameter from `values`. Raises OutputError."""
    plan = {name: TensorInfo(shape, dtype) for name, shape in tensor_plan(config).items()}
    parts = Parts(config)
    return _write(run, plan, lambda rows: _write_values(rows, parts, values, world), side_files, world)


def write_adapter(
    run: Path,
    base: str,
    deltas: Mapping[str, Factors],
    spec: LowRankSpec,
    targets: Sequence[str],
    world: World = ALONE,
) -> Path:
    """Low-rank changes as a PEFT adapter (adapter_config.json and adapter_model.safetensors). Raises OutputError."""
    known = {parameter: (whole(a).cpu(), whole(b).cpu()) for parameter, (a, b, _) in deltas.items()}
    return world.by_leader(lambda: _write_adapter(run, base, known, spec, targets))


def _write_adapter(
    run: Path,
    base: str,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    spec: LowRankSpec,
    targets: Sequence[str],
) -> Path:
    tensors: dict[str, torch.Tensor] = {}
    for parameter, (a, b) in factors.items():
        module = f"base_model.model.{parameter.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": a.contiguous(), f"{module}.lora_B.weight": b.contiguous()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    shutil.rmtree(run / _STAGING, ignore_errors=True)
    with StagedDirectory(run / _STAGING) as stage, explained(run):
        (stage.path / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
        (stage.path / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        stage.commit()
    return _move_in(run, CONFIG_FILE)


def common_files(writer: CheckpointWriter, config: Mapping[str, object], tokenizer: Tokenizer) -> None:
    """config.json and the tokenizer's files."""
    writer.add_json("config.json", dict(config))
    tokenizer.save(writer)


def _write(
    run: Path,
    plan: Mapping[str, TensorInfo],
    fill: Callable[[RowWriter], None],
    side_files: Callable[[CheckpointWriter], None],
    world: World,
) -> Path:
    """Every rank writes what `fill` of it writes, the leader all that stands around it."""
    writer = CheckpointWriter(run / _STAGING, plan, overwrite=True)

    def fill_mine() -> Counter[str]:
        with RowWriter(Path(stage), plan) as rows:
            fill(rows)
        return rows.rows

    def finish() -> None:
        writer.written_elsewhere(sum(found, Counter()))
        side_files(writer)
        writer.commit()
        _move_in(run)

    try:
        stage = world.by_leader(lambda: str(writer.__enter__().stage))
        found = world.gather(world.together(fill_mine))
        world.by_leader(finish)
    finally:
        if world.leads:
            writer.__exit__(None, None, None)
    return run


def _write_values(rows: RowWriter, parts: Parts, values: Mapping[str, torch.Tensor], world: World) -> None:
    """This rank's rows of each parameter: what several ranks hold is written by the first of them, what all hold is dealt
    out."""
    turns = set(world.every([name for name, value in values.items() if not isinstance(value, DTensor)]))
    for parameter, value in values.items():
        if isinstance(value, DTensor) and not first_of_copies(value):
            continue
        if not isinstance(value, DTensor) and parameter not in turns:
            continue
        mine = local(value.detach())
        starts, shape = place_of(value)
        for span in parts.spans(parameter, starts, shape):
            rows.write(span.name, span.first, span.of(mine))


def _own_factors(
    parts: Parts, deltas: Mapping[str, Factors], world: World
) -> list[tuple[str, tuple[torch.Tensor, torch.Tensor, float]]]:
    """The factors of the tensors that this rank adds them to, by name; all ranks put each one together in turn."""
    mine = set(world.every([name for parameter in deltas for name in parts.sources[parameter]]))
    found = []
    for parameter, (a, b, scale) in deltas.items():
        a, b, names = whole(a), whole(b), parts.sources[parameter]
        blocks = torch.split(b.flatten(0, -2), [parts.shapes[name][0] for name in names])
        for number, (name, rows) in enumerate(zip(names, blocks, strict=True)):
            if name in mine:  # of a stack gate_0, up_0, gate_1, ...: an expert's
                into = a[number * len(a) // len(names)] if a.dim() == 3 else a
                found.append((name, (into.clone(), rows.clone(), scale)))
    return found


def _move_in(run: Path, last: str = "config.json") -> Path:
    """Everything out of the staging directory into the run's; `last`, without which nothing loads, last."""
    with explained(run):
        (run / last).unlink(missing_ok=True)
        for path in sorted((run / _STAGING).iterdir(), key=lambda p: p.name == last):
            os.replace(path, run / path.name)
        (run / _STAGING).rmdir()
    return run


def tidy(run: Path) -> None:
    """Remove what a run that was killed at its very last moment left: files half written, and a staging directory with
    nothing in it."""
    staging.tidy(run)
    with suppress(OSError):
        (run / _STAGING).rmdir()
