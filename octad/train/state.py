"""The state of a run on disk: everything the next step depends on, so that resuming is bit-exact.

    save_state(run, step, tensors, facts, keep=2)
    tensors, facts = load_state(latest_state(run))

A state is a directory `states/step-00000120`: tensors (float32 masters, moments, router biases, random generators) in
safetensors, the rest (step, data position, config) in JSON. It appears whole under its name or not at all; older ones
go only after that. What is frozen is not saved: it is read from the model again, whose digests the state carries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from octad.checkpoint.staging import StagedDirectory, explained, space
from octad.errors import CheckpointError, OutputError

TENSORS, FACTS, FORMAT = "state.safetensors", "state.json", 1
# What may differ between the run that saved and the one that resumes; anything else would make another model of it.
FREE = (
    "steps", "batch", "optimizer.lr", "optimizer.router_lr", "optimizer.weight_decay", "optimizer.clip", "schedule",
    "evaluate", "save", "log_every", "device", "compile", "spike", "data.cache", "retries", "specialists",
)  # fmt: skip


def save_state(
    run: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], keep: int
) -> Path:
    """Write a state, then remove all but the newest `keep`. Raises OutputError; the earlier states are then intact."""
    final = run / "states" / f"step-{step:08}"
    if final.exists():  # saved at this very step before
        return final
    whole = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    needed = sum(t.nbytes for t in whole.values())
    with StagedDirectory(final) as stage, explained(final, needed):
        try:
            save_file(whole, stage.path / TENSORS)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OutputError(f"{final}: cannot be written ({error}): {space(run, needed)}") from None
        (stage.path / FACTS).write_text(json.dumps(dict(facts) | {"step": step, "format": FORMAT}, indent=1))
        stage.commit()
    for old in _states(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_state(run: Path) -> Path | None:
    """The newest state of a run."""
    return next(reversed(_states(run)), None)


def load_state(state: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and facts. Raises CheckpointError where it is damaged."""
    try:
        facts = json.loads((state / FACTS).read_text(encoding="utf-8"))
        return load_file(state / TENSORS), dict(facts)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{state}: damaged ({error}); remove it to resume from the one before"
        ) from None


def check_resumable(saved: Mapping[str, Any], now: Mapping[str, Any], label: str) -> list[str]:
    """The keys that changed since the state was saved, all of them harmless. Raises CheckpointError for the others."""
    changed = sorted(differing(saved, now))
    if fatal := [key for key in changed if not any(key == f or key.startswith(f + ".") for f in FREE)]:
        raise CheckpointError(
            f"{label}: cannot resume: {', '.join(fatal)} changed since the state was saved; "
            "put it back, or choose another -o"
        )
    return changed


def differing(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Dotted keys whose values differ between two configs given as plain data."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            yield from differing(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield at


def _states(run: Path) -> list[Path]:
    return sorted(path for path in (run / "states").glob("step-[0-9]*") if (path / FACTS).is_file())
