"""What a long combining run has done, beside its unfinished files: a killed run goes on where it stopped.

    journal = Journal(identity_of(plan, max_shard_bytes))
    with CheckpointWriter(output, tensors, adopt=journal.fits) as writer:
        journal.begin(writer)                     # what an earlier run has written is not written again
        gate_inputs(..., passage=journal)         # begins with the layer behind the last one that is on the disk
        journal.remove()                          # before the mixture gets its name

Between two layers, EVERY seconds apart at the least, everything written so far is sent to the disk; then come the
states of the calibration text, what the fitter made of each layer, and last, in one step, the list that says how far
all this goes. The identity is a digest of the recipe, the text, what will be written, and the size and time of every
file that is read: a run of anything else begins anew. Runs shorter than EVERY leave no journal.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from octad.checkpoint.source import TensorSource
from octad.checkpoint.writer import CheckpointWriter
from octad.combine.calibrate import Run
from octad.combine.states import States
from octad.fingerprint import digest_of
from octad.portable import sync
from octad.staging import bytes_in, explained, replace_file
from octad.telling import Tell, silent

if TYPE_CHECKING:
    from octad.combine.preflight import Plan

EVERY = 60.0  # seconds between two entries, at least
PLACE, IDENTITY, DONE = "journal", "identity", "done.json"
FORMAT = 1


class Remembers(Protocol):
    """A fitter: what it has made of a layer that all runs have passed, and how it takes that back."""

    def layer_facts(self, layer: int) -> dict[str, torch.Tensor]:
        """Everything that is known of the layer."""

    def restore_layer(self, layer: int, facts: dict[str, torch.Tensor]) -> None:
        """What layer_facts told, after the layers before it."""


class Journal:
    """Of one run; each of several processes (`rank`) has states of its own, the first writes the rest. `tell` gets a line
    where a run goes on. `first`: the layer to begin with."""

    def __init__(self, identity: str, tell: Tell = silent, rank: int = 0) -> None:
        self.identity, self.tell, self.rank = identity, tell, rank
        self.first = 0
        self.place = Path()
        self.writer: CheckpointWriter | None = None
        self._fitter: Remembers | None = None
        self._told = 0  # layers whose facts are on the disk
        self._last = time.monotonic()

    def fits(self, stage: Path) -> bool:
        """Whether a directory that a killed run has left was made of the same, and can be gone on with."""
        place = stage / PLACE
        try:
            return (place / IDENTITY).read_text() == self.identity and _done(place)["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def begin(self, writer: CheckpointWriter, fitter: Remembers) -> None:
        """Take up what was done, or begin to write down."""
        self.writer, self.place, self._fitter = writer, writer.stage / PLACE, fitter
        if not writer.adopted:
            with explained(self.place):
                self.place.mkdir()
                (self.place / IDENTITY).write_text(self.identity)
            return
        done = _done(self.place)
        self.first = self._told = int(done["layers"])
        for layer in range(self.first):
            fitter.restore_layer(layer, load_file(self.place / f"layer-{layer:05}"))
        writer.written_before(done["written"])
        self.tell(
            f"going on where an earlier run stopped: {writer.full_shards} of {writer.shards} shards kept,"
            f" {self.first} layers calibrated"
        )

    # ---- the calibration pass, and what comes after it -------------------------------------------------------

    def restore(self, states: States) -> None:
        """The states as they came to layer `first`."""
        states.load(self.states_file(self.first))

    def passed(self, layers: int, states: States) -> None:
        """So many layers are done, and their weights written."""
        if self.due:
            self.save_states(layers, states)
            self.enter(layers)

    def rest(self) -> None:
        """Some of what is written after the calibration pass is done."""
        if self.due:
            self.enter(self._told)

    @property
    def due(self) -> bool:
        """Whether it is time for an entry."""
        return time.monotonic() - self._last >= EVERY

    def states_file(self, layers: int) -> Path:
        """Where the states lie that come to this layer."""
        return self.place / f"states-{layers:05}.{self.rank}"

    def save_states(self, layers: int, states: States) -> None:
        """Put them on the disk."""
        with explained(self.place):
            states.save(self.states_file(layers))
            sync(self.states_file(layers))

    def enter(self, layers: int) -> None:
        """Write down that so many layers are done, whose states are saved, and all that was written so far."""
        assert self.writer is not None
        assert self._fitter is not None
        written = sorted(self.writer.written)
        self.writer.sync()
        with explained(self.place):
            for layer in range(self._told, layers):
                save_file(self._fitter.layer_facts(layer), path := self.place / f"layer-{layer:05}")
                sync(path)
            entry = {"format": FORMAT, "layers": layers, "written": written}
            replace_file(self.place / DONE, json.dumps(entry))
            sync(self.place)
            for old in self.place.glob("states-*"):
                if not old.name.startswith(f"states-{layers:05}."):
                    old.unlink()
        self._told, self._last = layers, time.monotonic()

    # ---- the end ---------------------------------------------------------------------------------------------

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the block before the end of the run: what there is to go on from stays, and is told."""
        try:
            yield
        except BaseException:
            if self.writer is not None and has_journal(self.writer.stage):
                self.writer.keep()
                size = bytes_in(self.writer.stage) / 1e9
                self.tell(f"kept for the same command to go on with: {self.writer.stage} ({size:.1f} GB)")
            raise

    def remove(self) -> None:
        """All is written: what follows is a rename."""
        shutil.rmtree(self.place)


def has_journal(stage: Path) -> bool:
    """Whether what a killed run has left may be worth something to the next."""
    return (stage / PLACE / DONE).is_file()


def identity_of(plan: Plan, runs: Sequence[Run], *facts: Any) -> str:
    """A digest of everything that the bytes of the result depend on."""
    texts: list[Any] = [[run.label, run.path, run.weight, [w.ids for w in run.windows]] for run in runs]
    texts += [[w.ids for w in windows] for windows in plan.repair_texts]
    recipe = plan.recipe.to_dict() | {
        name: getattr(plan.recipe, name).model_dump(mode="json") for name in ("router", "shared", "repair")
    }
    tensors = {name: [list(info.shape), str(info.dtype)] for name, info in plan.tensors.items()}
    files = sorted({fact for source in (plan.base, *plan.members) for fact in _files(source)})
    versions = [FORMAT, version("octad"), torch.__version__]
    return digest_of([versions, recipe, plan.config_dict, tensors, texts, files, *facts], default=str)


def _files(source: TensorSource) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of every file that a source reads, and those that it looks through."""
    for place in _places(source):
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file():
                found = path.stat()
                yield str(path.resolve()), found.st_size, found.st_mtime_ns


def _places(source: object) -> Iterable[Path]:
    for name in ("directory", "path"):
        if isinstance(place := getattr(source, name, None), Path) and place.exists():
            yield place
    for name in ("source", "base"):
        if (below := getattr(source, name, None)) is not None:
            yield from _places(below)


def _done(place: Path) -> dict[str, Any]:
    return dict(json.loads((place / DONE).read_text()))
