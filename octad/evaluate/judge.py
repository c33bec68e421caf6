"""Running the contestants: each reads all windows once, unless the cache knows what it said.

    judge = Judge(source, texts, cache, ranks, progress)
    records = judge.run({"python": Member(1), "mixture top-2": TopK(2)})

The mixture is loaded once, and only if somebody inside it has to be run. Under torchrun every rank reads its share of
the windows; where no rank can hold a model (`spread`) its weights lie over all of them, and no two models at once.

Shapes: T predicted tokens, L layers, G domains, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import ExpertView
from octad.dist import World, compute_dtype, own_device
from octad.errors import OctadError, RequestError
from octad.evaluate.contestants import (
    Contestant,
    Load,
    Member,
    Original,
    Soup,
    TopK,
    contestant,
    counted_load,
    fast_model,
)
from octad.evaluate.heldout import Texts
from octad.evaluate.nats import TOKENS_PER_BATCH, token_nats
from octad.evaluate.price import measuring
from octad.evaluate.results import Cache, Content, Record, key_of
from octad.evaluate.soup import AveragedSource
from octad.fast.spread import Whole, crowded, spread_model
from octad.machine import hardware
from octad.model import cost
from octad.model.config import ModelConfig, dense_config
from octad.model.transformer import Transformer
from octad.telling import Progress, quiet
from octad.text.windows import Batch, batches

T = TypeVar("T")
Within = Callable[[Callable[[], Any]], Any]
CUDA_TOKENS_PER_BATCH = 32768


def must_spread(source: TensorSource, world: World, asked: bool | None = None) -> bool:
    """Whether weights are to lie over all ranks: as it is asked, else where one rank's memory would be half full of them.
    Raises RequestError where it is asked of one process."""
    if world.size == 1:
        if asked:
            raise RequestError(
                "--shard: needs several processes; torchrun --nproc-per-node N -m octad evaluate ..."
            )
        return False
    device = own_device()
    return crowded(source.config, compute_dtype(device), device) if asked is None else asked


def one_for_tasks(source: TensorSource, asked: bool | None, *, alone: bool) -> None:
    """Of several processes the first answers tasks; the others end here where there is nothing else to do. Raises
    RequestError for a model that no process can hold."""
    if must_spread(source, world := World.join(), asked):
        raise RequestError(
            f"--tasks: answers come from one process, and {source.label} is to lie over {world.size}; let vLLM serve it"
            " (octad serve MODEL --engine vllm) and ask it with lm-eval's client (docs/serving.md)"
        )
    if alone and not world.leads:
        raise SystemExit(0)


def call(work: Callable[[], T]) -> T:
    """What the work gives: within nothing."""
    return work()


def soup_of(source: TensorSource, who: Contestant) -> TensorSource:
    """The mean of some experts, each with what they share, as a source of its own."""
    assert isinstance(who, Soup)
    return AveragedSource(tuple(ExpertView(source, expert) for expert in who.experts))


@dataclass
class Judge:
    """One source and the texts that all its contestants read."""

    source: TensorSource
    texts: Texts
    cache: Cache = field(default_factory=lambda: Cache(None))
    world: World = field(default_factory=World)
    progress: Progress = quiet
    dtype: torch.dtype | None = None
    spread: bool = False
    quantize: str | None = None  # round everybody's weights so: "int8", "int4"
    computed: list[str] = field(default_factory=list)  # whom the cache did not know
    _model: Transformer | None = field(default=None, repr=False)
    _whole: Whole | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.device = own_device()
        self.dtype = self.dtype or compute_dtype(self.device)
        self.content = Content(self.source)

    def run(self, who: Mapping[str, Contestant]) -> dict[str, Record]:
        """A record of each; the same on every rank."""
        keys = {name: self.key(contestant) for name, contestant in who.items()}
        found = self.world.by_leader(lambda: self._cached(keys))
        self.computed = sorted((name for name in who if name not in found), key=lambda n: self._apart(who[n]))
        steps = _Steps(self, {name: who[name] for name in self.computed})
        for name in self.computed:
            found[name] = self.judge(who[name], steps.tick)
            if self.world.leads:
                self.cache.put(keys[name], found[name])
        return {name: found[name] for name in who}

    def _cached(self, keys: Mapping[str, str]) -> dict[str, Record]:
        found = {name: self.cache.get(key) for name, key in keys.items()}
        return {name: record for name, record in found.items() if record is not None}

    def key(self, who: Contestant) -> str:
        """Of everything that its record depends on."""
        machine = {k: v for k, v in hardware(self.device).items() if k in ("cpu", "gpu", "threads")}
        windows = [self.texts.digest, *map(len, self.texts.domains.values())]
        ranks = [self.world.size, "spread"] if self.spread else self.world.size
        rounded = [self.quantize] if self.quantize else []
        return key_of(self.content.of(who), windows, str(self.dtype), machine, ranks, *rounded)

    def judge(self, who: Contestant, tick: Callable[[int], None]) -> Record:
        """Run one contestant over the windows of this rank, and put together what all ranks found."""
        mine = range(self.world.rank, len(self.texts.windows), self.world.size)
        windows = [self.texts.windows[i] for i in mine]
        batch = CUDA_TOKENS_PER_BATCH if self.device.type == "cuda" else TOKENS_PER_BATCH
        counting = isinstance(who, TopK) and who.k == self.source.config.num_experts_per_tok
        rounds = max(self.world.gather(len(list(batches(windows, batch))))) if self.spread else 0
        with self._running(who) as (model, within), self._counting(model, counting) as load:
            before = _Grouping(load, self.group_of).before if load else lambda batch: None
            read = partial(token_nats, tokens_per_batch=batch, progress=tick, before=before, rounds=rounds)
            with measuring(self.device) as measured:
                nats = within(lambda: read(model, windows))
        whole = np.zeros(self.texts.total, dtype=np.float32)
        for i, part in zip(mine, nats, strict=True):
            whole[self.texts.starts[i] :][: len(part)] = part
        counts = torch.stack(load.counts) if load else None
        self.world.add_up(
            t for t in (counts, torch.from_numpy(whole)) if t is not None
        )  # which shares its memory
        return Record(torch.from_numpy(whole), self._facts(measured), counts)

    def _facts(self, measured: Mapping[str, float]) -> dict[str, float]:
        read = sum(len(w.ids) for w in self.texts.windows)
        facts = {"tokens_per_second": read / self.world.largest(measured["seconds"])}
        if "working_bytes" in measured:
            facts["working_bytes"] = self.world.largest(measured["working_bytes"])
        return facts

    @contextmanager
    def _running(self, who: Contestant) -> Iterator[tuple[Transformer, Within]]:
        """The contestant, ready to run, and what to run it within; the source itself is loaded when somebody inside it is
        first asked for."""
        if self.spread:
            with self._over_all_ranks(who) as found:
                yield found
            return
        if isinstance(who, Original):
            yield fast_model(who.source, self.dtype, self.device, self.quantize), call
            return
        if self._model is None:
            self._model = fast_model(self.source, self.dtype, self.device, self.quantize)
        with contestant(self._model, who) as model:
            yield model, call

    @contextmanager
    def _over_all_ranks(self, who: Contestant) -> Iterator[tuple[Transformer, Within]]:
        """The same with weights over all ranks. A soup is read as a model of its own: no rank has all experts."""
        assert self.dtype is not None
        if self._apart(who):
            self.release()
            source = who.source if isinstance(who, Original) else soup_of(self.source, who)
            whole = spread_model(source, self.dtype, self.device, self.world)
            yield whole.model, whole.judge
            return
        if self._whole is None:
            self._whole = spread_model(self.source, self.dtype, self.device, self.world)
        with contestant(self._whole.model, who) as model:
            yield model, self._whole.judge

    def _apart(self, who: Contestant) -> bool:
        """Whether this one is loaded beside the source; of spread models these come last, the source let go of."""
        return self.spread and isinstance(who, (Original, Soup))

    def release(self) -> None:
        """Let go of the loaded model."""
        self._model = self._whole = None

    def _counting(self, model: Transformer, wanted: bool) -> Any:
        return counted_load(model, len(self.texts.domains)) if wanted else nullcontext()

    @cached_property
    def group_of(self) -> dict[int, int]:
        """The domain's number of each window, by identity."""
        return {id(w): g for g, windows in enumerate(self.texts.domains.values()) for w in windows}


@dataclass
class _Grouping:
    """Tells a Load, before each batch, which domain its tokens are from."""

    load: Load
    group_of: Mapping[int, int]

    def before(self, batch: Batch) -> None:
        if not batch.windows:
            self.load.groups_N = torch.full((batch.mask.numel(),), -1)
            return
        groups_B1 = torch.tensor([self.group_of[id(w)] for w in batch.windows])[:, None]
        self.load.groups_N = torch.where(batch.mask, groups_B1, -1).flatten()


class _Steps:
    """Progress over contestants of unequal price: the share of the FLOPs that are done."""

    def __init__(self, judge: Judge, who: Mapping[str, Contestant]) -> None:
        self.progress = judge.progress
        read = sum(len(w.ids) for w in judge.texts.windows[judge.world.rank :: judge.world.size])
        self.costs = [(_flops(judge.source, contestant), read) for contestant in who.values()]
        self.total, self.done, self.left = sum(c * n for c, n in self.costs), 0.0, read

    def tick(self, tokens: int) -> None:
        """Some tokens of the contestant whose turn it is are done."""
        cost = self.costs[0][0]
        self.done += cost * tokens
        self.left -= tokens
        if self.left <= 0 and len(self.costs) > 1:
            self.costs.pop(0)
            self.left = self.costs[0][1]
        self.progress(
            "judging", 1.0 if len(self.costs) == 1 and self.left <= 0 else min(1.0, self.done / self.total)
        )


def _flops(source: TensorSource, who: Contestant) -> float:
    config = shape_of(source, who)
    return float(cost.flops_per_token(config or source.config))


def shape_of(source: TensorSource, who: Contestant) -> ModelConfig | None:
    """The shape of a contestant as a model of its own; None where no config can say it."""
    if isinstance(who, Original):
        return who.source.config
    if isinstance(who, TopK):
        return replace(source.config, num_experts_per_tok=who.k)
    if isinstance(who, (Member, Soup)):
        try:
            return dense_config(source.config)
        except OctadError:
            return None
    return source.config
