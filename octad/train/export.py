"""A trained model as a normal checkpoint: what did not change is copied byte for byte, what did is converted once.

    changes = Changes(values={"model.norm.weight": tensor}, deltas={"model...q_proj.weight": (A, B, scale)})
    write_trained(run, source, changes, side_files)

A low-rank change is added in float32 to the weights as they are on disk, so that only one rounding separates the file
from the sum. The run's directory already holds its log and states; the model is written whole beside them, then
moved in with config.json last, so that a run that is cut short never looks like a model.

Shapes: E experts, F feed-forward hidden, D model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save

from octad import staging
from octad.checkpoint.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from octad.checkpoint.load import content_names
from octad.checkpoint.names import parameter_sources, tensor_plan
from octad.checkpoint.source import TensorInfo, TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.model.config import ModelConfig
from octad.staging import StagedDirectory, explained
from octad.text.tokenizer import Tokenizer
from octad.train.lowrank import Factors
from octad.train.sections import LowRankSpec

_STAGING = "model-in-the-making"


@dataclass(frozen=True)
class Changes:
    """By parameter of the Transformer: new values, or a low-rank delta on what is on disk."""

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    deltas: Mapping[str, Factors] = field(default_factory=dict)


def hub_tensors(
    config: ModelConfig, parameter: str, value: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """A parameter as the hub's tensors: itself, or stacked experts [E, rows, D] taken apart."""
    names, shapes = parameter_sources(config)[parameter], tensor_plan(config)
    if value.dim() < 3:
        yield names[0], value
        return
    heights = [shapes[name][0] for name in names]
    yield from zip(names, torch.split(value.flatten(0, 1), heights), strict=True)


def write_trained(
    run: Path, source: TensorSource, changes: Changes, side_files: Callable[[CheckpointWriter], None]
) -> Path:
    """Write the source with the changes into a run's directory. Raises OutputError where it cannot be written."""
    plan = {name: source.info(name) for name in content_names(source)}
    with CheckpointWriter(run / _STAGING, plan, overwrite=True) as writer:
        written = set()
        for name, tensor in _changed(source, changes):
            writer.write(name, tensor)
            written.add(name)
        writer.copy_all([name for name in plan if name not in written], source)
        side_files(writer)
        writer.commit()
    return _move_in(run)


def write_new(
    run: Path,
    config: ModelConfig,
    values: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    side_files: Callable[[CheckpointWriter], None],
) -> Path:
    """Write a model that has no source, every parameter from `values`. Raises OutputError."""
    plan = {name: TensorInfo(shape, dtype) for name, shape in tensor_plan(config).items()}
    with CheckpointWriter(run / _STAGING, plan, overwrite=True) as writer:
        for parameter in parameter_sources(config):
            for name, tensor in hub_tensors(config, parameter, values[parameter]):
                writer.write(name, tensor)
        side_files(writer)
        writer.commit()
    return _move_in(run)


def write_adapter(
    run: Path, base: str, deltas: Mapping[str, Factors], spec: LowRankSpec, targets: Sequence[str]
) -> Path:
    """Low-rank changes as a PEFT adapter (adapter_config.json and adapter_model.safetensors). Raises OutputError."""
    tensors: dict[str, torch.Tensor] = {}
    for parameter, (a, b, _) in deltas.items():
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
    writer.add_text("config.json", json.dumps(dict(config), indent=2) + "\n")
    tokenizer.save(writer)


def _changed(source: TensorSource, changes: Changes) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, value in changes.values.items():
        yield from hub_tensors(source.config, parameter, value)
    for parameter, (a, b, scale) in changes.deltas.items():
        parts = list(hub_tensors(source.config, parameter, b))
        for number, (name, rows) in enumerate(parts):
            into = (
                a[number * len(a) // len(parts)] if a.dim() == 3 else a
            )  # gate_0, up_0, gate_1, ...: an expert's
            yield name, source.read(name).float().addmm_(rows.cpu(), into.cpu(), alpha=scale)


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
