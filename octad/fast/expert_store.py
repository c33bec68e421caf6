"""Experts that are on the disk until a token is sent to them: which are in memory, which go, which are read ahead.

    store = ExpertStore(placed, budget=300_000_000)
    store.demand(layer, [2, 5], [2, 4])         # both are in memory when this returns; the next layer's 2 and 4 may come
    store.note([layer], experts_1NA)            # what the tokens of a step were sent to
    store.stats.line()

Memory is divided into slots of one record each. Real text stays with its experts: one that was in use lately will be
again. So what goes is the record with the smallest count of tokens, where each token makes what came before it count
DECAY times as much; counts of all layers compare, since all layers see all tokens. What a layer needs does not go, so
that there must be room for one layer's experts at least: a prompt uses all of them. Guesses are read as long as most of
them are right: who stays with its experts misses what nobody would have guessed.

The answers are to the bit those of a model that is in memory. Shapes: L layers, E experts, N tokens, A experts a token.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octad.checkpoint.extent import byte_view
from octad.checkpoint.record_layout import Record
from octad.errors import RequestError
from octad.fast.record_reader import RecordReader, Ticket
from octad.fast.records import PlacedWeights
from octad.figures import human, percent
from octad.kernels.arena import fresh
from octad.machine import available_memory

DECAY = 0.95  # of a few measured: 0.9 to 0.98 differ by a hundredth of the hits
EMPTY = -1
RIGHT = 0.7  # of the last guesses, from which on the next ones are read: a wrong one costs a read and a place
LEARN, RETRY = 0.1, 500  # what the last guess counts of that; layers without a guess until one is tried again
COUNTED = 64  # steps at most that are counted together


@dataclass
class StoreStats:
    """Counts since the start, or since they were taken; an expert of a layer that a step needs is one request."""

    slots: int
    experts: int
    slot_bytes: int
    requests: int = 0
    misses: int = 0
    late: int = 0  # of the misses: on their way already
    guessed: int = 0
    read: int = 0  # records
    stalled: float = 0.0  # seconds
    tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requests whose expert was in memory."""
        return 1 - self.misses / max(1, self.requests)

    @property
    def uniform_hit_rate(self) -> float:
        """The same if routers chose with equal chances."""
        return min(1.0, self.slots / self.experts)

    def report(self) -> dict[str, float]:
        """For JSON; bytes and seconds are a token's."""
        tokens = max(1, self.tokens)
        return {
            "budget_bytes": self.slots * self.slot_bytes,
            "expert_bytes": self.experts * self.slot_bytes,
            "hit_rate": self.hit_rate,
            "uniform_hit_rate": self.uniform_hit_rate,
            "bytes_per_token": self.read * self.slot_bytes / tokens,
            "stall_seconds_per_token": self.stalled / tokens,
            "guessed": self.guessed,
            "tokens": self.tokens,
        }

    def line(self) -> str:
        """For people."""
        found = self.report()
        return (
            f"experts: {percent(found['hit_rate'], 1)} were in memory (routers that choose by chance:"
            f" {percent(found['uniform_hit_rate'])}), {human(found['bytes_per_token'], 'B')} read and"
            f" {found['stall_seconds_per_token'] * 1e3:.1f} ms waited a token"
        )


def expert_records(placed: PlacedWeights) -> dict[int, list[Record]]:
    """Where the experts of each layer that has some lie in the file."""
    config = placed.source.config
    layers = [number for number in range(config.num_hidden_layers) if config.is_moe_layer(number)]
    return {layer: [placed.record(layer, e) for e in range(config.num_experts)] for layer in layers}


def slots_within(budget: int, records: Mapping[int, Sequence[Record]]) -> tuple[int, int]:
    """How many experts `budget` bytes hold, of all that there are, and the bytes of the largest. Raises RequestError for
    a budget below one layer's experts."""
    size = max(record.nbytes for layer in records.values() for record in layer)
    experts = max(map(len, records.values()))
    slots = min(budget // size, experts * len(records))
    if slots < experts:
        raise RequestError(
            f"--memory: found {human(budget, 'B')}, but a prompt needs the {experts} experts of a layer at once,"
            f" which take {human(experts * size, 'B')}; give that much or more"
        )
    return slots, size


class ExpertStore:
    """The experts of one checkpoint within `budget` bytes. Raises RequestError for a budget below one layer's experts."""

    def __init__(
        self, placed: PlacedWeights, budget: int, *, cached: bool | None = None, ahead: bool = True
    ) -> None:
        self.placed, self.ahead = placed, ahead
        config, self.records = placed.source.config, expert_records(placed)
        self.layers = list(self.records)
        self.E, self._following = config.num_experts, dict(itertools.pairwise(self.layers))
        slots, size = slots_within(budget, self.records)
        room, total = available_memory(), placed.file.layout.nbytes
        if cached is None:  # room for the file besides the slots: the system's cache is as good as memory
            cached = room is not None and room > total + slots * size
        self.reader = RecordReader(placed.file.path, cached=cached)
        weakref.finalize(self, self.reader.end).atexit = False  # then the reader closes itself, and waits
        self._stats = StoreStats(slots, len(self.layers) * self.E, size)
        self.memory = fresh(slots * size)
        # read by the kernels: what is in memory, and whether they are to say what the next layer may want
        self.here = np.zeros((config.num_hidden_layers, self.E), np.uint8)
        self.guessing = np.ones(1, np.uint8)
        self._slot_of = np.full((config.num_hidden_layers, self.E), EMPTY)
        self._owner: list[tuple[int, int] | None] = [None] * slots
        self._counted = np.zeros((config.num_hidden_layers, self.E))
        self._noted: list[np.ndarray] = []  # of the layers of `_noted_of`, not counted yet
        self._noted_of: Sequence[int] = ()
        self.settled = False  # all experts are in memory, and stay
        self._coming: dict[tuple[int, int], Ticket] = {}
        self._guesses: dict[int, set[int]] = {}
        self._right, self._unguessed = 1.0, 0
        self.moved: Callable[[int, int, torch.Tensor], None] = lambda layer, expert, memory: None

    # ---- what the layers ask for ---------------------------------------------------------------------------

    def demand(self, layer: int, experts: Collection[int], next_ones: Collection[int] = ()) -> None:
        """These experts of a layer, in memory; what the next layer will probably ask for is begun behind them. Raises
        CheckpointError where they cannot be read."""
        self.collect()
        missing = [e for e in experts if not self.here[layer, e]]
        self._stats.misses += len(missing)
        begun, keep = time.perf_counter(), {(layer, e) for e in experts}
        tickets = [self._begin(layer, e, keep, urgent=True) for e in missing]
        if next_ones and (following := self._following.get(layer)) is not None and self._wants(next_ones):
            self._guess(following, next_ones, keep)
        if missing:
            self.reader.wait([ticket for ticket in tickets if ticket is not None])
            self.collect()
            self._stats.stalled += time.perf_counter() - begun

    def _wants(self, guesses: Collection[int]) -> bool:
        """Whether to read ahead: what a prompt will need for sure, or what is worth a try."""
        return self.ahead and (len(guesses) == self.E or self._worth_guessing())

    def _worth_guessing(self) -> bool:
        """Whether enough of the last guesses were right, or it is time to see whether they are now."""
        if self._right >= RIGHT or self._unguessed >= RETRY:
            self._unguessed = 0
            return True
        return False

    def _judge(self, layer: int, used: set[int]) -> None:
        """Of a layer's guesses, which were right."""
        for expert in self._guesses.pop(layer, ()):
            self._right += LEARN * ((expert in used) - self._right)

    def _guess(self, layer: int, experts: Collection[int], keep: set[tuple[int, int]]) -> None:
        keep = keep | {(layer, e) for e in experts}
        for e in experts:
            if self.here[layer, e] or (layer, e) in self._coming:
                continue
            if self._begin(layer, e, keep, urgent=False) is not None and len(experts) < self.E:
                self._guesses.setdefault(layer, set()).add(e)

    @property
    def stats(self) -> StoreStats:
        """What was counted until now."""
        self._count()
        return self._stats

    def reset(self) -> None:
        """Count from here on."""
        old = self.stats
        self._stats = StoreStats(old.slots, old.experts, old.slot_bytes)

    def note(self, layers: Sequence[int], experts_LNA: np.ndarray) -> None:
        """Which experts the tokens of a step were sent to, in these layers.

        A step has read all its weights, so that each place that counting touches comes from memory: it is put off until
        somebody asks for counts."""
        if self._guesses:
            for layer, experts in zip(layers, experts_LNA, strict=True):
                self._judge(layer, set(experts.ravel().tolist()))
        if len(self._noted) >= COUNTED or (self._noted and not self._alike(layers, experts_LNA)):
            self._count()
        self._noted.append(experts_LNA.copy())
        self._noted_of = layers
        self._unguessed += len(layers)
        self.guessing[0] = self.ahead and (self._right >= RIGHT or self._unguessed >= RETRY)
        if self._stats.slots == self._stats.experts and not self.settled:
            self._complete()

    def _complete(self) -> None:
        """Where there is room for all experts, begin with one that nobody asked for yet."""
        self.collect()
        missing = np.argwhere(self.here[self.layers] == 0)
        self.settled = not len(missing)
        if len(missing) and not self._coming:
            place, expert = missing[0].tolist()
            self._begin(self.layers[place], expert, set(), urgent=False)

    def _alike(self, layers: Sequence[int], experts_LNA: np.ndarray) -> bool:
        """Whether a step may be counted with those that were noted."""
        return layers == self._noted_of and experts_LNA.shape == self._noted[-1].shape

    def _count(self) -> None:
        """Count what was noted."""
        if not self._noted:
            return
        experts_TLNA, layers = np.stack(self._noted), self._noted_of
        self._noted = []
        T, L, N, _ = experts_TLNA.shape
        worth_T1N1 = DECAY ** np.arange(T * N - 1, -1, -1).reshape(T, 1, N, 1)
        places = experts_TLNA + self.E * np.arange(L)[:, None, None]
        worth = np.broadcast_to(worth_T1N1, places.shape)
        counts = np.bincount(places.reshape(-1), worth.reshape(-1), L * self.E).reshape(L, self.E)
        self._counted[layers] = self._counted[layers] * DECAY ** (T * N) + counts
        asked = np.zeros((T, L * self.E), bool)
        asked[np.arange(T)[:, None], places.reshape(T, -1)] = True
        self._stats.requests += int(asked.sum())
        if layers[0] == self.layers[0]:
            self._stats.tokens += T * N

    @property
    def _counts(self) -> np.ndarray:
        """Of each layer's experts, the tokens that were sent to it, earlier ones less."""
        self._count()
        return self._counted

    def collect(self) -> None:
        """Note which of the reads are done."""
        for key in [key for key, ticket in self._coming.items() if ticket.done]:
            ticket = self._coming.pop(key)
            if ticket.error is None:
                self.here[key] = 1
            else:
                self._free(key)

    # ---- inside --------------------------------------------------------------------------------------------

    def _begin(self, layer: int, expert: int, keep: set[tuple[int, int]], *, urgent: bool) -> Ticket | None:
        """Ask for a record, or for its place in the queue; None where a guess finds no room."""
        if (ticket := self._coming.get((layer, expert))) is not None:
            if urgent:
                self._stats.late += 1
                self.reader.hurry(ticket)
            return ticket
        slot = self._room(keep, urgent)
        if slot is None:
            return None
        record, size = self.records[layer][expert], self._stats.slot_bytes
        memory = self.memory[slot * size : slot * size + record.nbytes]
        self._owner[slot], self._slot_of[layer, expert] = (layer, expert), slot
        self.moved(layer, expert, memory)
        self._stats.read += 1
        self._stats.guessed += not urgent
        ticket = self._coming[layer, expert] = self.reader.ask(
            record.offset, byte_view(memory), urgent=urgent
        )
        return ticket

    def _room(self, keep: set[tuple[int, int]], urgent: bool) -> int | None:
        """A slot that is free, or that the least used record gives up; for a demand there always is one."""
        if None in self._owner:
            return self._owner.index(None)
        free = self.here.astype(bool)  # what is on its way stays
        for key in keep:
            free[key] = False
        if not free.any():
            if not urgent:
                return None
            self.reader.wait(list(self._coming.values()))  # guesses have taken the room
            self.collect()
            return self._room(keep, urgent)
        victim = np.where(free, self._counts, np.inf)
        gone = divmod(int(victim.argmin()), self.E)
        slot = int(self._slot_of[gone])
        self._free(gone)
        return slot

    def _free(self, key: tuple[int, int]) -> None:
        self.here[key] = 0
        self._owner[int(self._slot_of[key])] = None
        self._slot_of[key] = EMPTY
