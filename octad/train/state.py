"""The state of a run on disk: everything the next step depends on, so that resuming is bit-exact.

    saver = Saver(run, world, keep=2, asynchronous=False)
    saver.save(step, tensors, facts)              # every rank its part
    state = latest_state(run); facts = load_facts(state); load_tensors(state, targets)

A state is a directory `states/step-00000120`: tensors (float32 masters, moments, router biases, random generators) in
safetensors, the rest (step, data position, config) in JSON. It appears whole under its name or not at all; older ones
go only after that. What is frozen is not saved: it is read from the model again, whose digests the state carries.

Reading and writing are torch.distributed.checkpoint's, in its safetensors format: every rank writes a file with what it
holds, whatever is held by several is written by one, and any number of ranks reads what it needs of it. One process
writes the plain file that this comes to. All ranks need to see the directory. Asynchronous: the state is copied into
memory and written by a thread while the next steps run; whatever goes wrong there is told at the next save.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from octad.checkpoint.config_file import one_line
from octad.dist import World
from octad.errors import CheckpointError, OutputError
from octad.guard import read_json
from octad.staging import StagedDirectory, explained, space

TENSORS, FACTS, FORMAT = "state.safetensors", "state.json", 2
# What may differ between the run that saved and the one that resumes; anything else would make another model of it.
FREE = (
    "steps", "batch", "optimizer.lr", "optimizer.router_lr", "optimizer.weight_decay", "optimizer.clip", "schedule",
    "evaluate", "save", "log_every", "device", "compile", "spike", "data.cache", "retries", "specialists", "experts",
    "parallel", "ray",
)  # fmt: skip


class _Position(BaseModel):
    taken: dict[str, Annotated[int, Field(ge=0)]]


class Facts(BaseModel):
    """What a state says besides its tensors; `data` is Stream.state_dict's, the rest is compared alone."""

    model_config = ConfigDict(strict=True)
    step: int = Field(ge=0)
    format: int
    files: dict[str, int]
    config: dict[str, Any]
    identity: dict[str, Any]
    data: _Position
    mean_loss: float
    ranks: int


class Saver:
    """Writes the states of a run, all ranks together."""

    def __init__(self, run: Path, world: World, keep: int, asynchronous: bool) -> None:
        self.run, self.world, self.keep, self.asynchronous = run, world, keep, asynchronous
        self._thread = ThreadPoolExecutor(1) if asynchronous else None
        self._pending: Future[None] | None = None
        # of its own, since a thread must not talk in between of the steps' exchanges
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Write a state, then remove all but the newest `keep`. Raises OutputError; earlier states are then intact."""
        self.wait()
        final = self.run / "states" / f"step-{step:08}"
        if self.world.by_leader(final.exists):  # saved at this very step before
            return
        kept = dict(tensors)
        if self.asynchronous:  # a copy in the machine's memory
            kept = cast(dict[str, torch.Tensor], BlockingAsyncStager().stage(kept))
        work = partial(self._write, final, kept, dict(facts) | {"step": step, "format": FORMAT})
        if self._thread is None:
            work()
        else:
            self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Until the last state is on disk. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, final: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        needed = sum(t.nbytes for t in tensors.values())
        stage = StagedDirectory(final, own_place=True)
        told = self.world.by_leader(lambda: str(stage.__enter__().path), self._group)
        try:
            with explained(final, needed):
                _write_tensors(Path(told), tensors, self._group, self.world.size, final, needed)
            self.world.by_leader(partial(self._finish, stage, facts), self._group)
        finally:
            if self.world.leads:
                stage.__exit__(None, None, None)

    def _finish(self, stage: StagedDirectory, facts: Mapping[str, Any]) -> None:
        with explained(stage.final):
            files = {p.name: p.stat().st_size for p in sorted(stage.path.glob("*.safetensors"))}
            (stage.path / FACTS).write_text(json.dumps(dict(facts) | {"files": files}, indent=1))
            stage.commit()
        for old in _states(self.run)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


def latest_state(run: Path) -> Path | None:
    """The newest state of a run."""
    return next(reversed(_states(run)), None)


def load_facts(state: Path) -> dict[str, Any]:
    """What is not a tensor, after a look at the files. Raises CheckpointError where it is damaged."""
    try:
        raw = read_json(state / FACTS)
        if isinstance(raw, dict) and raw.get("format") != FORMAT:
            raise ValueError(f"format {raw.get('format')!r}, this octad reads {FORMAT}")
        facts = Facts.model_validate(raw)
        if state.name != f"step-{facts.step:08}":
            raise ValueError(f"it says that it is of step {facts.step}")
        for name, size in facts.files.items():
            if (state / name).stat().st_size != size:
                raise ValueError(f"{name} has not the {size:,} bytes that it was written with")
        return facts.model_dump()
    except ValidationError as error:
        raise _damaged(state, ValueError(f"{FACTS}: {one_line(error, Facts)}")) from None
    except (OSError, ValueError, CheckpointError) as error:
        raise _damaged(state, error) from None


def saved_names(state: Path) -> set[str]:
    """The tensors of a state. Raises CheckpointError where it is damaged."""
    return set(_metadata(state))


def read_masters(state: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a state by parameter name, whole, whatever number of ranks wrote it. Raises CheckpointError
    where it is damaged."""
    known = _metadata(state).items()
    targets = {name: torch.empty(about.size) for name, about in known if name.startswith("master.")}
    _load(state, targets, alone=True)
    return {name.removeprefix("master."): value for name, value in targets.items()}


def load_tensors(state: Path, targets: Mapping[str, torch.Tensor], world: World) -> None:
    """Fill the targets, each rank its part of the DTensors. Raises CheckpointError where it is damaged."""
    _load(state, targets, alone=world.size == 1)


def _metadata(state: Path) -> Mapping[str, Any]:
    """What is known of each tensor of a state. Raises CheckpointError where it is damaged."""
    try:
        return HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(state, error) from None


def _load(state: Path, targets: Mapping[str, torch.Tensor], *, alone: bool) -> None:
    try:
        with _quiet():
            load(dict(targets), storage_reader=HuggingFaceStorageReader(str(state)), no_dist=alone)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, CheckpointException) as error:
        raise _damaged(state, error) from None


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


def _write_tensors(
    place: Path,
    tensors: dict[str, torch.Tensor],
    group: dist.ProcessGroup | None,
    ranks: int,
    final: Path,
    needed: int,
) -> None:
    try:
        if ranks == 1:
            save_file({n: t.detach().contiguous() for n, t in tensors.items()}, place / TENSORS)
        else:
            writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
            with _quiet():
                save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # of any rank, told to all
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        raise OutputError(f"{final}: cannot be written ({cause}): {space(final.parent, needed)}") from None
    except SafetensorError as error:  # its way to say that the disk is full
        raise OutputError(f"{final}: cannot be written ({error}): {space(final.parent, needed)}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a checkpoint of one process is one of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _damaged(state: Path, error: BaseException) -> CheckpointError:
    words = " ".join(str(error).split())[:300]
    return CheckpointError(f"{state}: damaged ({words}); remove it to resume from the one before")
