"""Fitting all routers of a mixture: text or prompts in, one weight per layer out, with the statistics to refit.

    fitter = fitter_of(spec, config, calibrations, generalist, dtype)
    for layer, number, x_ND in gate_inputs(source, fitter.runs, dtype):  # source: a mixture, written or not
        fitter.see(layer, number, x_ND)
    fitter.fit().weights[3]                                               # weight_ED of layer 3's router

A fitter reads and writes nothing: it says which text it wants sent through which expert, and is shown what comes out.

Shapes: L layers, E experts, D model, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch

from octad.combine import router
from octad.combine.calibrate import Run
from octad.combine.recipe import RouterSpec
from octad.combine.statistics import Statistics
from octad.model.config import ModelConfig
from octad.text.windows import Window

LOGISTIC_TOKENS = 65536  # of all runs together, that the logistic fit looks at in each layer
LOGISTIC_BYTES = 256 << 20  # and at most this much of them in memory
GENERALIST_WEIGHT = 3.0
PIECE = 32  # tokens that are run together: the first tokens of a text are the hardest to route, and few in long windows


@dataclass
class Calibration:
    """What one expert is calibrated on: windows of its text, or of its prompts (positive, and perhaps negative).
    `longer`: windows of its text for closed-form repair."""

    windows: list[Window]
    negative: list[Window]
    longer: list[Window] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return sum(len(w.ids) for w in self.windows)


@dataclass
class RouterFit:
    """weights[l] is weight_ED of layer l; statistics are kept where the method has additive ones (ridge)."""

    weights: list[torch.Tensor]
    statistics: Statistics | None = None


class Fitter(Protocol):
    """A way to fit routers: what it wants to see, and what it makes of it."""

    runs: Sequence[Run]

    def see(self, layer: int, number: int, x_ND: torch.Tensor) -> None:
        """The router inputs of run `number` in a layer; layer by layer, each run once."""

    def fit(self) -> RouterFit:
        """The routers, all runs having been seen in all layers."""

    def layer_facts(self, layer: int) -> dict[str, torch.Tensor]:
        """What it has made of a layer that all runs have passed: enough to go on without seeing it again."""

    def restore_layer(self, layer: int, facts: dict[str, torch.Tensor]) -> None:
        """Take that back, layer after layer, before anything is seen."""


def fitter_of(
    spec: RouterSpec,
    config: ModelConfig,
    calibrations: Sequence[Calibration],
    generalist: int | None,
    dtype: torch.dtype,
) -> Fitter:
    """The fitter that the recipe names, for a mixture of this config. `generalist`: the expert that is the base; `dtype`:
    of the inputs that it will see."""
    L, E, D = config.num_hidden_layers, config.num_experts, config.hidden_size
    if spec.method == "random":
        return LayerByLayer([], weights=[router.random(E, D, seed=spec.seed, layer=n) for n in range(L)])
    if spec.method == "prompts":
        return _prompts(spec, calibrations)
    runs = runs_of(calibrations, generalist, config.eos_token_ids)
    return (
        Additive(spec, Statistics.zeros(L, E, D), runs)
        if spec.method == "ridge"
        else _logistic(spec, runs, D * dtype.itemsize, generalist)
    )


class Additive:
    """Ridge: runs are counted into statistics, or out of them with sign=-1; all runs of a label must come together."""

    def __init__(
        self, spec: RouterSpec, statistics: Statistics, runs: Sequence[Run], sign: float = 1.0
    ) -> None:
        self.runs, self.spec, self.statistics, self._sign = runs, spec, statistics, sign
        self._mass: dict[int, float] = {}
        for run in runs:
            self._mass[run.label] = self._mass.get(run.label, 0.0) + run.mass()

    def see(self, layer: int, number: int, x_ND: torch.Tensor) -> None:
        """Count the inputs of a run into, or out of, the statistics of its layer."""
        run = self.runs[number]
        self.statistics.add(layer, run.label, x_ND, self._sign * run.weight / self._mass[run.label])

    def layer_facts(self, layer: int) -> dict[str, torch.Tensor]:
        """Its sums."""
        return {"gram": self.statistics.grams[layer], "means": self.statistics.means[layer]}

    def restore_layer(self, layer: int, facts: dict[str, torch.Tensor]) -> None:
        """Its sums again."""
        self.statistics.grams[layer].copy_(facts["gram"])
        self.statistics.means[layer].copy_(facts["means"])

    def fit(self) -> RouterFit:
        """Solve every layer, and give the statistics along."""
        return solve_ridge(self.statistics, self.spec)


class LayerByLayer:
    """Keeps what `keep` leaves of each run's inputs until a layer is complete, and makes a weight_ED of it by `solve`, in
    a thread: the text goes on through the next layer meanwhile."""

    def __init__(
        self,
        runs: Sequence[Run],
        keep: Callable[[torch.Tensor], torch.Tensor] = lambda x_ND: x_ND,
        solve: Callable[[list[torch.Tensor]], torch.Tensor] = lambda kept: kept[0],
        weights: Sequence[torch.Tensor] = (),
    ) -> None:
        self.runs, self._keep, self._solve, self._weights = runs, keep, solve, list(weights)
        self._kept: dict[int, torch.Tensor] = {}
        self._solving: Future[torch.Tensor] | None = None
        self._pool = ThreadPoolExecutor(1)

    def see(self, layer: int, number: int, x_ND: torch.Tensor) -> None:
        """Keep a run's inputs; solve the layer when those of all runs are there."""
        self._kept[number] = self._keep(x_ND)
        if len(self._kept) == len(self.runs):
            self._solved()
            kept = [self._kept[n] for n in range(len(self.runs))]
            self._solving, self._kept = self._pool.submit(_alone, self._solve, kept), {}

    def layer_facts(self, layer: int) -> dict[str, torch.Tensor]:
        """Its router."""
        self._solved()
        return {"weight": self._weights[layer]}

    def restore_layer(self, layer: int, facts: dict[str, torch.Tensor]) -> None:
        """Its router again."""
        self._weights.append(facts["weight"])

    def fit(self) -> RouterFit:
        """The routers solved so far: those of all layers."""
        self._solved()
        self._pool.shutdown()
        torch.set_num_threads(torch.get_num_threads())  # PyTorch gives later threads what was set last
        return RouterFit(self._weights)

    def _solved(self) -> None:
        """Wait for the layer that is being solved, if there is one."""
        if self._solving is not None:
            self._weights.append(self._solving.result())
            self._solving = None


def _alone(solve: Callable[[list[torch.Tensor]], torch.Tensor], kept: list[torch.Tensor]) -> torch.Tensor:
    """Solve on one thread: the others belong to the text."""
    torch.set_num_threads(1)
    return solve(kept)


def runs_of(
    calibrations: Sequence[Calibration], generalist: int | None, ends: Sequence[int] = ()
) -> list[Run]:
    """What is sent through which expert: of the pieces of a text two in three through its own expert, every third,
    counting GENERALIST_WEIGHT times, through the generalist; without one, all through its own. A window in which a turn
    ends (`ends`: the tokens that do that) is a conversation, and stays whole: an answer comes after its question. The
    generalist's are a run of their own, before the rest of its text."""
    runs = []
    for e, calibration in enumerate(calibrations):
        if not calibration.windows:
            continue
        pieces = [
            piece
            for window in calibration.windows
            for piece in ([window] if is_talk(window, ends) else cut(window))
        ]
        if generalist is None or e == generalist:
            talks = [piece for piece in pieces if e == generalist and is_talk(piece, ends)]
            others = [piece for piece in pieces if not (e == generalist and is_talk(piece, ends))]
            runs += [Run(e, e, part) for part in (talks, others) if part]
            continue
        runs.append(Run(e, e, [piece for i, piece in enumerate(pieces) if i % 3 != 2]))
        runs.append(Run(e, generalist, pieces[2::3] or pieces, GENERALIST_WEIGHT))
    return runs


def is_talk(window: Window, ends: Sequence[int]) -> bool:
    """Whether a turn ends in it, by one of these tokens."""
    return not set(ends).isdisjoint(window.ids)


def cut(window: Window) -> list[Window]:
    """A window in pieces of PIECE tokens, the last one shorter; each is read as if a text began there."""
    ids = window.ids
    return [Window(ids[i : i + PIECE], 0, window.document) for i in range(0, len(ids), PIECE)]


def solve_ridge(statistics: Statistics, spec: RouterSpec) -> RouterFit:
    """The ridge routers that belong to these statistics."""
    layers = range(len(statistics.grams))
    weights = [
        router.ridge(statistics, layer, strength=_strength(spec), temperature=_temperature(spec))
        for layer in layers
    ]
    return RouterFit(weights, statistics)


def _strength(spec: RouterSpec) -> float:
    return spec.ridge if spec.ridge is not None else router.DEFAULT_STRENGTH[spec.method]


def _temperature(spec: RouterSpec) -> float:
    return spec.temperature if spec.temperature is not None else router.DEFAULT_TEMPERATURE[spec.method]


def _logistic(spec: RouterSpec, runs: Sequence[Run], row_bytes: int, generalist: int | None) -> Fitter:
    """From an even sample of what the routers will read. The generalist is favoured on its first run: its conversations,
    or all its text where it has none."""
    most = _rows_per_run(len(runs), row_bytes)
    own = next((n for n, run in enumerate(runs) if run.label == generalist), None)

    def solve(samples: list[torch.Tensor]) -> torch.Tensor:
        """A layer's router [E, D] from the sampled inputs of each run, which weigh its mass together."""
        sizes, favoured = torch.tensor([len(x) for x in samples]), None
        if own is not None and generalist is not None and spec.generalist:
            favoured = router.Favoured(generalist, samples[own], spec.generalist)
        return router.logistic(
            torch.cat(samples),
            (torch.tensor([run.mass() for run in runs]) / sizes).repeat_interleave(sizes),
            torch.tensor([run.label for run in runs]).repeat_interleave(sizes),
            strength=_strength(spec),
            temperature=_temperature(spec),
            favoured=favoured,
        )

    return LayerByLayer(runs, lambda x_ND: _sampled(x_ND, most), solve)


def _prompts(spec: RouterSpec, calibrations: Sequence[Calibration]) -> Fitter:
    """Positive prompts through their own expert, negative ones too."""
    positive = [Run(e, e, c.windows) for e, c in enumerate(calibrations)]
    negative = [Run(e, e, c.negative) for e, c in enumerate(calibrations) if c.negative]

    def solve(means: list[torch.Tensor]) -> torch.Tensor:
        """A layer's router [E, D] from the means of its positive prompts, less those of the negative ones."""
        against: list[torch.Tensor | None] = [None] * len(positive)
        for run, mean in zip(negative, means[len(positive) :], strict=True):
            against[run.label] = mean
        return router.prompts(means[: len(positive)], against, temperature=_temperature(spec))

    return LayerByLayer(positive + negative, lambda x_ND: x_ND.float().mean(0), solve)


def _rows_per_run(runs: int, row_bytes: int) -> int:
    """How many inputs of each run the logistic fit takes."""
    return max(1, min(LOGISTIC_TOKENS, LOGISTIC_BYTES // row_bytes) // runs)


def _sampled(x_ND: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows: the same in every layer and each time, and without a pattern, since pieces are of equal
    length and a stride would see few positions."""
    if len(x_ND) <= most:
        return x_ND
    draw = torch.Generator().manual_seed(0)
    return x_ND[torch.randperm(len(x_ND), generator=draw)[:most].sort().values]
