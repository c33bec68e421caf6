"""Fitting all routers of a mixture: text or prompts in, one weight per layer out, with the statistics to refit.

    fit = fit_routers(source, spec, texts, dtype)      # source: a mixture, written or not
    fit.weights[3]                                     # weight_ED of layer 3's router

Shapes: L layers, E experts, D model, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from octad.checkpoint.source import TensorSource
from octad.combine import router
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.recipe import RouterSpec
from octad.combine.statistics import Statistics
from octad.text.windows import Window

Progress = Callable[[str, float], None]
LOGISTIC_TOKENS = 65536  # of all runs together, that the logistic fit looks at in each layer
LOGISTIC_BYTES = 256 << 20  # and at most this much of them in memory
GENERALIST_WEIGHT = 3.0
PIECE = 32  # tokens that are run together: the first tokens of a text are the hardest to route, and few in long windows


@dataclass
class Calibration:
    """What one expert is calibrated on: windows of its text, or of its prompts (positive, and perhaps negative)."""

    windows: list[Window]
    negative: list[Window]

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return sum(len(w.ids) for w in self.windows)


@dataclass
class RouterFit:
    """weights[l] is weight_ED of layer l; statistics are kept where the method has additive ones (ridge)."""

    weights: list[torch.Tensor]
    statistics: Statistics | None = None


def quiet(stage: str, done: float) -> None:
    """A Progress that says nothing."""


def fit_routers(
    source: TensorSource,
    spec: RouterSpec,
    calibrations: Sequence[Calibration],
    generalist: int | None,
    dtype: torch.dtype,
    progress: Progress = quiet,
) -> RouterFit:
    """Fit the routers of every layer by the method that the recipe names. `generalist`: the expert that is the base."""
    config = source.config
    L, E, D = config.num_hidden_layers, config.num_experts, config.hidden_size
    if spec.method == "random":
        return RouterFit([router.random(E, D, seed=spec.seed, layer=layer) for layer in range(L)])
    if spec.method == "ridge":
        statistics = Statistics.zeros(L, E, D)
        observe(source, statistics, runs_of(calibrations, generalist), dtype, progress)
        return solve_ridge(statistics, spec)
    if spec.method == "logistic":
        return RouterFit(_logistic(source, spec, runs_of(calibrations, generalist), dtype, progress))
    return RouterFit(_prompts(source, spec, calibrations, dtype, progress))


def runs_of(calibrations: Sequence[Calibration], generalist: int | None) -> list[Run]:
    """What is sent through which expert: of the pieces of a text two in three through its own expert, every third,
    counting GENERALIST_WEIGHT times, through the generalist; without one, all through its own."""
    runs = []
    for e, calibration in enumerate(calibrations):
        if not calibration.windows:
            continue
        pieces = [piece for window in calibration.windows for piece in cut(window)]
        if generalist is None or e == generalist:
            runs.append(Run(e, e, pieces))
            continue
        runs.append(Run(e, e, [piece for i, piece in enumerate(pieces) if i % 3 != 2]))
        runs.append(Run(e, generalist, pieces[2::3] or pieces, GENERALIST_WEIGHT))
    return runs


def cut(window: Window) -> list[Window]:
    """A window in pieces of PIECE tokens, the last one shorter; each is read as if a text began there."""
    ids = window.ids
    return [Window(ids[i : i + PIECE], 0, window.document) for i in range(0, len(ids), PIECE)]


def observe(
    source: TensorSource,
    statistics: Statistics,
    runs: Sequence[Run],
    dtype: torch.dtype,
    progress: Progress = quiet,
    sign: float = 1.0,
) -> None:
    """Count runs into the statistics (or out of them with sign=-1); all runs of a label must come together."""
    mass: dict[int, float] = {}
    for run in runs:
        mass[run.label] = mass.get(run.label, 0.0) + run.mass()
    steps = source.config.num_hidden_layers * len(runs)
    for done, (layer, number, x_ND) in enumerate(gate_inputs(source, runs, dtype), 1):
        run = runs[number]
        statistics.add(layer, run.label, x_ND, sign * run.weight / mass[run.label])
        progress("calibrating", done / steps)


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


def _logistic(
    source: TensorSource, spec: RouterSpec, runs: Sequence[Run], dtype: torch.dtype, progress: Progress
) -> list[torch.Tensor]:
    """One weight_ED a layer, from an even sample of what the routers will read."""
    most = _rows_per_run(len(runs), source.config.hidden_size * dtype.itemsize)
    weights = []
    for samples in _by_layer(source, runs, dtype, progress, lambda x_ND: _sampled(x_ND, most)):
        sizes = torch.tensor([len(x) for x in samples])
        fitted = router.logistic(
            torch.cat(samples),
            (torch.tensor([run.mass() for run in runs]) / sizes).repeat_interleave(sizes),
            torch.tensor([run.label for run in runs]).repeat_interleave(sizes),
            strength=_strength(spec),
            temperature=_temperature(spec),
        )
        weights.append(fitted)
    return weights


def _prompts(
    source: TensorSource,
    spec: RouterSpec,
    calibrations: Sequence[Calibration],
    dtype: torch.dtype,
    progress: Progress,
) -> list[torch.Tensor]:
    """Positive prompts through their own expert, negative ones too; one weight_ED a layer."""
    positive = [Run(e, e, c.windows) for e, c in enumerate(calibrations)]
    negative = [Run(e, e, c.negative) for e, c in enumerate(calibrations) if c.negative]
    weights = []
    for means in _by_layer(source, positive + negative, dtype, progress, lambda x_ND: x_ND.float().mean(0)):
        against: list[torch.Tensor | None] = [None] * len(positive)
        for run, mean in zip(negative, means[len(positive) :], strict=True):
            against[run.label] = mean
        weights.append(router.prompts(means[: len(positive)], against, temperature=_temperature(spec)))
    return weights


def _by_layer(
    source: TensorSource,
    runs: Sequence[Run],
    dtype: torch.dtype,
    progress: Progress,
    keep: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[list[torch.Tensor]]:
    """keep(x_ND) of every run, one layer after the other; x itself is let go at once."""
    steps = source.config.num_hidden_layers * len(runs)
    kept: dict[int, torch.Tensor] = {}
    for done, (_, number, x_ND) in enumerate(gate_inputs(source, runs, dtype), 1):
        kept[number] = keep(x_ND)
        progress("calibrating", done / steps)
        if len(kept) == len(runs):
            yield [kept[n] for n in range(len(runs))]
            kept = {}


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
