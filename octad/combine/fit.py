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
from octad.checkpoint.text import Window
from octad.combine import router
from octad.combine.calibrate import Run, gate_inputs
from octad.combine.recipe import RouterSpec
from octad.combine.statistics import Statistics

Progress = Callable[[str, float], None]
LOGISTIC_TOKENS = 2048  # of each run and layer that the logistic fit looks at
GENERALIST_WEIGHT = 3.0


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
    temperature = spec.temperature or router.DEFAULT_TEMPERATURE[spec.method]
    if spec.method == "logistic":
        runs = runs_of(calibrations, generalist)
        layers = _by_layer(source, runs, dtype, progress)
        labels = [run.label for run in runs]
        return RouterFit(
            [
                router.logistic(*_thinned(x, labels), strength=spec.ridge, temperature=temperature)
                for x in layers
            ]
        )
    return RouterFit(_prompts(source, calibrations, temperature, dtype, progress))


def runs_of(calibrations: Sequence[Calibration], generalist: int | None) -> list[Run]:
    """What is sent through which expert: two thirds of the budget through the text's own expert, and half of these
    windows, counting GENERALIST_WEIGHT times, through the generalist; without one, all through its own."""
    runs = []
    for e, calibration in enumerate(calibrations):
        if not calibration.windows:
            continue
        windows = calibration.windows
        if generalist is None or e == generalist:
            runs.append(Run(e, e, windows))
            continue
        windows = windows[: max(1, round(len(windows) * 2 / 3))]
        runs.append(Run(e, e, windows))
        runs.append(Run(e, generalist, windows[::2], GENERALIST_WEIGHT))
    return runs


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
    for done, (layer, number, x_ND, weight_N) in enumerate(gate_inputs(source, runs, dtype), 1):
        label = runs[number].label
        statistics.add(layer, label, x_ND, weight_N / mass[label], sign)
        progress("calibrating", done / steps)


def solve_ridge(statistics: Statistics, spec: RouterSpec) -> RouterFit:
    """The ridge routers that belong to these statistics."""
    temperature = spec.temperature or router.DEFAULT_TEMPERATURE["ridge"]
    layers = range(len(statistics.grams))
    weights = [
        router.ridge(statistics, layer, strength=spec.ridge, temperature=temperature) for layer in layers
    ]
    return RouterFit(weights, statistics)


def _prompts(
    source: TensorSource,
    calibrations: Sequence[Calibration],
    temperature: float,
    dtype: torch.dtype,
    progress: Progress,
) -> list[torch.Tensor]:
    """Positive prompts through their own expert, negative ones too; one weight_ED a layer."""
    positive = [Run(e, e, c.windows) for e, c in enumerate(calibrations)]
    negative = [Run(e, e, c.negative) for e, c in enumerate(calibrations) if c.negative]
    weights = []
    for inputs in _by_layer(source, positive + negative, dtype, progress):
        means = [(w[:, None] * x.float()).sum(0) / w.sum() for x, w in inputs]
        against: list[torch.Tensor | None] = [None] * len(positive)
        for run, mean in zip(negative, means[len(positive) :], strict=True):
            against[run.label] = mean
        weights.append(router.prompts(means[: len(positive)], against, temperature=temperature))
    return weights


def _by_layer(
    source: TensorSource, runs: Sequence[Run], dtype: torch.dtype, progress: Progress
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """x_ND and weight_N of every run, one layer after the other."""
    steps = source.config.num_hidden_layers * len(runs)
    pieces: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for done, (_, number, x_ND, weight_N) in enumerate(gate_inputs(source, runs, dtype), 1):
        pieces[number] = (x_ND, weight_N)
        progress("calibrating", done / steps)
        if len(pieces) == len(runs):
            yield [pieces[n] for n in range(len(runs))]
            pieces = {}


def _thinned(
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]], labels: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_ND, weight_N and label_N of all runs, at most LOGISTIC_TOKENS of each, evenly over it."""
    xs, weights, marks = [], [], []
    for (x_ND, weight_N), label in zip(inputs, labels, strict=True):
        step = max(1, len(x_ND) // LOGISTIC_TOKENS)
        xs.append(x_ND[::step].float())
        weights.append(weight_N[::step])
        marks.append(torch.full((len(xs[-1]),), label))
    return torch.cat(xs), torch.cat(weights), torch.cat(marks)
