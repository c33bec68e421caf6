"""The calibration pass: text through the shared attention and one expert, to see what the routers will read.

    for layer, number, x_ND in gate_inputs(source, runs, dtype):  # x: exactly the tensor that a router reads
        ...

Each expert's text runs through its own expert, and part of it through the generalist (the base as an expert) too. The
first is what a well-routed token looks like; the second is what a token looks like before anyone has chosen well, and
cannot give the label away by the fingerprint of its own expert (docs/log.md has the measurement). Neither depends on the
other specialists, so the statistics of an expert stay true when others come or go.

Batches go through a layer side by side, one thread each: they share nothing, and what is small enough is as fast on one.
One layer of one expert is in memory at a time (of small ones the next one, too; of a large one some rows of a matrix).
Each weight is read once. Inputs of one run are in memory, too; the states of all of them may lie in a file (states.py).
Padding never reaches the statistics.

Shapes: B sequences, S positions, N real tokens of one run, D model, F feed-forward hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from octad.checkpoint.source import TensorSource
from octad.combine.layer_parts import (
    Write,
    blocks_of_rows,
    dense_mlp,
    embedded,
    expert_bytes,
    expert_names,
    forget,
    read_all,
    shared_block,
    shared_names,
)
from octad.combine.states import States
from octad.dist import one_thread_each
from octad.errors import CheckpointError
from octad.model.moe import MLP
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer, RMSNorm
from octad.text.windows import Batch, Window, batches

Texts = Callable[
    [int], Iterator[tuple[torch.Tensor, Batch]]
]  # a run's number -> its states h_BSD, batch by batch
Settle = Callable[[int, Rope, Texts], None]
Refit = Callable[[int, int, DecoderLayer, Rope, Texts], None]
BETWEEN = -1  # in the place of a run's number: all runs have passed the layer
SINGLY = 2 << 30  # bytes of an expert in memory, beyond which its matrices are read one after the other
READ_AHEAD = 64 << 20  # bytes of an expert up to which the next one is read while one is at work
BATCH_TOKENS = 512  # more are no faster; fewer windows differ less in length: less padding


class Passage(Protocol):
    """Who is told how far the text has come, and may know how far it came before."""

    first: int  # layer to begin with

    def restore(self, states: States) -> None:
        """Put the states in their place as they came to layer `first`."""

    def passed(self, layers: int, states: States) -> None:
        """All runs have passed so many layers."""


@dataclass(frozen=True)
class Run:
    """Text of expert `label` sent through expert `path`; every token counts `weight` times."""

    label: int
    path: int
    windows: Sequence[Window]
    weight: float = 1.0

    def mass(self) -> float:
        """The sum of its tokens' weights."""
        return self.weight * sum(len(w.ids) for w in self.windows)


@torch.no_grad()
def gate_inputs(
    source: TensorSource,
    runs: Sequence[Run],
    dtype: torch.dtype,
    write: Write = forget,
    settle: Settle | None = None,
    refit: Refit | None = None,
    passage: Passage | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yields (layer, number of the run, x_ND) for every layer: router inputs of the run's real tokens.

    `source` is a mixture, written or not; an expert that no run passes through is not read. Each tensor that is read
    goes to `write` before it is used, so that a mixture in the making is written from one reading. Arithmetic and x
    are in `dtype`. Before a layer is read, `settle` is shown the states of each run that come to it; before each of
    its experts is, in the last layer too, `refit` is shown them, with the shared part that they go through. With a
    `passage` it begins with that one's first layer, and behind each one yields (layer, BETWEEN, nothing), `passed`
    having been told.
    """
    first = 0 if passage is None else passage.first
    if not runs or first == source.config.num_hidden_layers:
        return
    texts = [list(batches(run.windows, BATCH_TOKENS)) for run in runs]
    tokens = sum(batch.tokens.numel() for text in texts for batch in text)
    with (
        States(tokens * source.config.hidden_size * dtype.itemsize) as states,
        one_thread_each() as pool,
    ):
        work = _Pass(source, runs, texts, states, pool, dtype, write)
        if passage is not None and first:
            passage.restore(states)
        for layer in range(first, source.config.num_hidden_layers):
            if settle is not None:
                settle(layer, work.rope, work.texts_of)
            yield from work.through(layer, refit)
            if passage is not None:
                passage.passed(layer + 1, states)
                yield layer, BETWEEN, torch.empty(0)


class _Pass:
    """All runs on their way through the layers, one layer after the other. Of each batch the number of its states."""

    def __init__(
        self,
        source: TensorSource,
        runs: Sequence[Run],
        texts: Sequence[Sequence[Batch]],
        states: States,
        pool: Executor,
        dtype: torch.dtype,
        write: Write,
    ) -> None:
        self.source, self.states, self.pool, self.dtype, self.write = source, states, pool, dtype, write
        self.config, self.rope = source.config, Rope(source.config)
        embed = embedded(source, [batch for text in texts for batch in text], dtype, write)
        self.numbered = [[(states.append(embed(batch)), batch) for batch in text] for text in texts]
        self.paths = {
            path: [n for n, run in enumerate(runs) if run.path == path]
            for path in sorted({run.path for run in runs})
        }  # an expert -> the numbers of its runs

    def texts_of(self, number: int) -> Iterator[tuple[torch.Tensor, Batch]]:
        """A run's states as they are now, batch by batch."""
        return ((self.states[place], batch) for place, batch in self.numbered[number])

    def through(self, layer: int, refit: Refit | None) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Take all runs through one layer; yields what gate_inputs does of each."""
        block = shared_block(self.config, layer, self._read(shared_names(self.config, layer)))
        last, size = layer == self.config.num_hidden_layers - 1, expert_bytes(self.config, self.dtype)
        singly = not last and size > SINGLY
        running = deque[_Running]()
        for path, numbers in self.paths.items():
            if refit is not None:
                yield from _seen(running, layer)  # states must not change meanwhile
                refit(layer, path, block, self.rope, self.texts_of)
            mlp = None
            if not last and not singly:
                mlp = dense_mlp(self.config, self._read(expert_names(self.config, layer, path)))
            yield from _seen(running, layer)  # of the expert before, while which this one was read
            for number in numbers:
                running.append(
                    self._begun(number, path, partial(_advance, block, mlp, self.rope, self.states))
                )
                if size > READ_AHEAD:
                    yield from _seen(running, layer)
        yield from _seen(running, layer)
        if singly:
            norm = block.post_attention_layernorm
            del block  # attention is done with, and large too
            for path in self.paths:
                self._singly(layer, path, norm)

    def _begun(self, number: int, path: int, advance: Callable[[int, Batch], torch.Tensor]) -> _Running:
        jobs = [self.pool.submit(advance, place, batch) for place, batch in self.numbered[number]]
        return _Running(number, path, jobs)

    def _singly(self, layer: int, path: int, norm: RMSNorm) -> None:
        names = expert_names(self.config, layer, path)
        places = [place for number in self.paths[path] for place, _ in self.numbered[number]]
        _through_singly(self.source, norm, names, self.states, places, self.dtype, self.write)

    def _read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        return read_all(self.source, names, self.dtype, self.write)


def _seen(running: deque[_Running], layer: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """What is on its way, in the order in which it began, each as soon as all of it is through."""
    while running:
        yield running.popleft().seen(layer)


@dataclass(frozen=True)
class _Running:
    """A run on its way through a layer, batch by batch."""

    number: int
    path: int
    jobs: Sequence[Future[torch.Tensor]]

    def seen(self, layer: int) -> tuple[int, int, torch.Tensor]:
        """What gate_inputs yields, once all batches are through. Raises CheckpointError."""
        return layer, self.number, _finite(torch.cat([job.result() for job in self.jobs]), layer, self.path)


@torch.no_grad()  # threads have to be told each
def _advance(
    block: DecoderLayer, mlp: MLP | None, rope: Rope, states: States, number: int, batch: Batch
) -> torch.Tensor:
    """Take one batch through the layer, in place in `states`; returns the gate inputs of its real tokens, x_ND.

    Without a network the states end behind attention: the last layer's is left out, since no router reads what it makes,
    and one that is too large comes after all batches."""
    h_BSD = block.attend(states[number], rope)
    x_BSD: torch.Tensor = block.post_attention_layernorm(h_BSD)
    states[number] = h_BSD if mlp is None else h_BSD + mlp(x_BSD)
    return x_BSD[batch.mask]


def _through_singly(
    source: TensorSource,
    norm: RMSNorm,
    names: Mapping[str, str],
    states: States,
    places: Sequence[int],
    dtype: torch.dtype,
    write: Write,
) -> None:
    """Take batches, which stand behind attention, through an expert of which some rows of a matrix are in memory at once.
    What lies between its products is kept for all of them, in a file where it is much. The operations are MLP's."""

    def rows(part: str) -> Iterator[torch.Tensor]:
        return blocks_of_rows(source, names[f"{part}_proj.weight"], dtype, write)

    down = source.info(names["down_proj.weight"]).shape
    tokens = sum(states[place].shape[:2].numel() for place in places)
    with (
        States(tokens * down[1] * dtype.itemsize) as between,
        States(tokens * down[0] * dtype.itemsize) as made,
    ):
        parts: dict[int, list[int]] = {place: [] for place in places}  # of F, one from every block
        for gate_fD, up_fD in zip(rows("gate"), rows("up"), strict=True):
            for place in places:
                x_BSD = norm(states[place])  # each time: kept, it would take as much room as the states
                y_BSf = F.silu(F.linear(x_BSD, gate_fD)) * F.linear(x_BSD, up_fD)
                parts[place].append(between.append(y_BSf))
        added: dict[int, list[int]] = {place: [] for place in places}  # of D
        for down_dF in rows("down"):
            for place in places:
                added[place].append(made.append(F.linear(_joined(between, parts[place]), down_dF)))
        for place in places:
            states[place] = states[place] + _joined(made, added[place])


def _joined(states: States, numbers: Sequence[int]) -> torch.Tensor:
    """Parts of the last dimension, put together."""
    return states[numbers[0]] if len(numbers) == 1 else torch.cat([states[n] for n in numbers], -1)


def _finite(x_ND: torch.Tensor, layer: int, path: int) -> torch.Tensor:
    """The same. Raises CheckpointError where it holds what is no number: nothing can be fitted on that."""
    if not x_ND.sum(dtype=torch.float32).isfinite():
        raise CheckpointError(
            f"expert number {path + 1}: what its text makes of layer {layer} holds NaN or infinite values;"
            " its weights or the base's are damaged, or too large for this precision"
        )
    return x_ND
