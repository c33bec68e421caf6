"""Combining by the processes of torchrun: each takes some members through, the files are written by all, one index.

    torchrun --nnodes 4 --nproc-per-node 1 -m octad combine recipe.yaml -o mixture/

A member's text runs on one rank, which reads the member's weights for that and writes them; what the routers would read
travels to the leader, who fits them in the order of one process. What nobody has read is dealt out, each tensor copied or
computed by one rank. So the result is that of one process to the byte, and no rank holds more than one process would. All
ranks have to see the members and the output, which appears when all is done. Between two layers all ranks now and
then put what they have on the disk, so that as many of them can go on with a long run that was cut short
(journal.py).

Shapes: N tokens of a run, D model.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from octad.checkpoint.names import is_ffn, router_name
from octad.checkpoint.row_writer import RowWriter
from octad.checkpoint.writer import CheckpointWriter
from octad.combine.build import plan_provenance, write_sidecars
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.fit import Fitter, RouterFit, fitter_of
from octad.combine.journal import PLACE, Journal, identity_of
from octad.combine.mixture import MixtureSource
from octad.combine.preflight import Plan
from octad.combine.states import States
from octad.dist import World, compute_dtype
from octad.errors import OctadError, RecipeError
from octad.telling import Progress, Tell, silent

OK, FAILED = 0, 1


def combine_together(
    plan: Plan,
    output: Path,
    world: World,
    *,
    overwrite: bool,
    max_shard_bytes: float,
    progress: Progress,
    tell: Tell = silent,
) -> Path:
    """Write the mixture of a plan, all ranks together. Raises as `combine` does, and RecipeError for a way to share that
    needs the text of all members in one place."""
    alone = ["shared: regmean"] if plan.recipe.shared.method == "regmean" else []
    if alone := [*alone, *(["repair: closed-form"] if plan.recipe.repair.method == "closed-form" else [])]:
        raise RecipeError(f"{alone[0]} needs all members' text in one process; combine without torchrun")
    texts = [tuple(window.ids) for c in plan.calibrations for window in (*c.windows, *c.negative)]
    digests = world.gather(hashlib.sha256(repr(texts).encode()).hexdigest())
    if len(set(digests)) > 1:  # answers that experts gave to questions, say
        raise RecipeError("the processes do not have the same calibration text; combine without torchrun")
    source = plan.source()
    part = _Part(plan, source, world, progress)
    identity = identity_of(plan, part.runs, str(part.dtype), max_shard_bytes, world.size)
    journal = SharedJournal(identity, tell, world)
    options: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite}
    writer = CheckpointWriter(output, plan.tensors, adopt=journal.fits, **options)
    try:
        stage = Path(world.by_leader(lambda: str(writer.__enter__().stage)))
        with ThreadPoolExecutor(1) as background, journal.kept():
            journal.begin_together(writer, stage, part.fitter)
            origins = background.submit(source.provenance) if world.leads else None
            with RowWriter(stage, plan.tensors, max_shard_bytes) as rows:
                fit = part.carry_out(rows, journal)
            found = world.gather(rows.rows)
            world.by_leader(lambda: _finish(writer, plan, found, fit, origins, journal))
    finally:
        if world.leads:
            writer.__exit__(None, None, None)
    return output


class SharedJournal(Journal):
    """Of all ranks: each keeps its states, the leader everything else. An entry takes all of them."""

    def __init__(self, identity: str, tell: Callable[[str], None], world: World) -> None:
        super().__init__(identity, tell, world.rank)
        self.world = world
        self.before: frozenset[str] = frozenset()  # written by an earlier run
        self._states: States | None = None

    def begin_together(self, writer: CheckpointWriter, stage: Path, fitter: Fitter | None) -> None:
        """What `begin` does on the leader; the others hear how far an earlier run had come."""

        def begin() -> tuple[int, frozenset[str]]:
            assert fitter is not None
            self.begin(writer, fitter)
            return self.first, writer.written

        self.first, self.before = self.world.by_leader(begin)
        self.place = stage / PLACE

    def passed(self, layers: int, states: States) -> None:
        """Kept until all ranks are so far."""
        self._states = states

    def between(self, layers: int, rows: RowWriter, *, failed: bool) -> None:
        """All ranks are here. An entry where the leader finds that it is time, and nobody has failed."""
        told = self.world.gather((self.due, failed))
        if not told[0][0] or any(failure for _, failure in told):
            return
        self.world.together(lambda: self._own_part(layers, rows))
        names = {name for counts in self.world.gather(rows.rows) for name in counts}
        self.world.by_leader(lambda: self._leaders_part(layers, names))

    def _own_part(self, layers: int, rows: RowWriter) -> None:
        rows.sync()
        if self._states is not None:
            self.save_states(layers, self._states)

    def _leaders_part(self, layers: int, names: set[str]) -> None:
        assert self.writer is not None
        self.writer.written_before(names - self.writer.written)
        self.enter(layers)


def _finish(
    writer: CheckpointWriter,
    plan: Plan,
    found: Sequence[Counter[str]],
    fit: RouterFit | None,
    origins: Future[Any] | None,
    journal: SharedJournal,
) -> None:
    assert fit is not None
    assert origins is not None
    counts = sum(found, Counter())
    writer.written_elsewhere({name: count for name, count in counts.items() if name not in writer.written})
    provenance = plan_provenance(plan, plan.calibrations, origins.result())
    write_sidecars(writer, plan.config_dict, plan.tokenizer, provenance, plan.calibrations, fit)
    writer.finish()
    journal.remove()
    writer.commit()


class _Part:
    """What one rank does."""

    rows: RowWriter
    journal: SharedJournal

    def __init__(self, plan: Plan, source: MixtureSource, world: World, progress: Progress) -> None:
        self.plan, self.source, self.world, self.progress = plan, source, world, progress
        self.dtype = compute_dtype()
        spec, config = plan.recipe.router, plan.config
        fitter = fitter_of(spec, config, plan.calibrations, plan.generalist, self.dtype)
        self.runs: Sequence[Run] = fitter.runs
        self.fitter: Fitter | None = fitter if world.leads else None  # the others need its runs alone
        paths = sorted({run.path for run in self.runs})
        self.owners = [paths.index(run.path) % world.size for run in self.runs]
        self.order = [
            (layer, number)
            for layer in range(config.num_hidden_layers)
            for path in paths
            for number, run in enumerate(self.runs)
            if run.path == path
        ]

    def carry_out(self, rows: RowWriter, journal: SharedJournal) -> RouterFit | None:
        """Calibrate and write; the leader's routers."""
        self.rows, self.journal = rows, journal
        failed = self._calibrate()
        self.world.together(lambda: _raise(failed))
        fit = self.world.together(lambda: self.fitter.fit() if self.fitter is not None else None)
        written = {name for counts in self.world.gather(self.rows.rows) for name in counts}
        written |= self.journal.before
        self.world.together(lambda: self._write_rest(written, fit))
        return fit

    def _calibrate(self) -> OctadError | None:
        """Own runs in, what all of them show to the fitter in the order of one process; what went wrong here. A rank that
        fails says so instead of its next inputs; the leader goes on listening to the others, so that none hangs."""
        own, gone, failed = self._own(), set[int](), None
        each = len(self.runs)
        for done, (layer, number) in enumerate(self.order, 1):
            if done <= self.journal.first * each:
                continue
            if done % each == 1 % each and layer > self.journal.first:
                failed = self._between(layer, own, failed)
            owner = self.owners[number]
            if owner in gone or self.world.rank not in (owner, 0):
                continue
            x_ND = None
            if owner == self.world.rank:
                try:
                    x_ND = next(own)
                except OctadError as error:
                    failed = error
            if owner != 0:
                x_ND = self._told(owner, number) if self.world.leads else self._tell(x_ND)
            if x_ND is None:
                gone.add(owner)
            elif self.fitter is not None and not gone:
                self.fitter.see(layer, number, x_ND)
                self.progress("calibrating", done / len(self.order))
        if self.order and self.journal.first < self.plan.config.num_hidden_layers:
            failed = self._between(self.plan.config.num_hidden_layers, own, failed)
        return failed

    def _between(
        self, layers: int, own: Iterator[torch.Tensor], failed: OctadError | None
    ) -> OctadError | None:
        """All runs have passed so many layers, own ones up to the last of what they do there; what went wrong so far."""
        if failed is None and self.world.rank in self.owners:
            try:
                next(own)
            except OctadError as error:
                failed = error
        self.journal.between(layers, self.rows, failed=failed is not None)
        return failed

    def _own(self) -> Iterator[torch.Tensor]:
        """The inputs of this rank's runs, in the order of all."""
        mine = [run for run, owner in zip(self.runs, self.owners, strict=True) if owner == self.world.rank]
        for _, _, x_ND in gate_inputs(self.source, mine, self.dtype, self._write, passage=self.journal):
            yield x_ND

    def _write(self, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        """A member's weights by the one who has read them; what is shared, and read by all, by the leader."""
        if (self.world.leads or is_ffn(name)) and name not in self.journal.before:
            self.rows.write(name, first, tensor)

    def _tell(self, x_ND: torch.Tensor | None) -> torch.Tensor | None:
        """Send inputs to the leader, or that there are none."""
        dist.send(torch.tensor([OK if x_ND is not None else FAILED]), 0)
        if x_ND is not None:
            dist.send(x_ND.contiguous().view(torch.uint8), 0)
        return x_ND

    def _told(self, owner: int, number: int) -> torch.Tensor | None:
        """What a rank sends of one of its runs."""
        state = torch.empty(1, dtype=torch.int64)
        dist.recv(state, owner)
        if int(state) == FAILED:
            return None
        tokens = sum(len(window.ids) for window in self.runs[number].windows)
        x_ND = torch.empty(tokens, self.plan.config.hidden_size, dtype=self.dtype)
        dist.recv(x_ND.view(torch.uint8), owner)
        return x_ND

    def _write_rest(self, written: set[str], fit: RouterFit | None) -> None:
        family, source = self.plan.config.model_type, self.source
        routers = [router_name(family, layer) for layer in range(self.plan.config.num_hidden_layers)]
        if fit is not None:
            for name, weight_ED in zip(routers, fit.weights, strict=True):
                self.rows.write(name, 0, weight_ED)
        mine = self.world.every([n for n in source.names() if n not in written and n not in set(routers)])
        self.rows.copy_all([name for name in mine if source.extent(name) is not None], source)
        for name in mine:
            if source.extent(name) is None:
                self.rows.write(name, 0, source.read(name))
        self.progress("writing", 1.0)


def _raise(error: OctadError | None) -> None:
    if error is not None:
        raise error
