"""What a demonstration of one's own base takes: seconds by a step that is measured, bytes by the model's shape.

pace = step_seconds(config); costs_of(project, base.config, mixture, pace, tokens=(4096, 320, 0))
rank_within(base.config, specialists=7)     # the rank at which all adapters stay small
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from octad.dist import compute_dtype, product_rate
from octad.evaluate.estimate import USUAL, judging_seconds
from octad.machine import memory_of
from octad.model import cost
from octad.model.config import ModelConfig
from octad.project.layout_text import Project
from octad.train.branch import branch_learner
from octad.train.run_config import BranchConfig
from octad.train.trainer import Trainer

ADAPTERS = 40e6  # bytes of all adapters together, at most
RANKS = (3, 16)  # least and most
STATES = 2 * 3  # states that are kept, each with a master and two moments
ROUNDED = 1.07  # bytes of a weight in int8, with its scales
# times the first model's memory, what one after another takes: freed blocks do not all fit the next
AGAIN = 1.4
DECODING = 1.5  # times a prompt's time, what a token of an answer takes where many are written at once
TOKEN = 3.5  # bytes of a token in a file of text, about


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, of a specialist, of the base's answers, of combining, of judging and of all; the mixture's
    parameters and bytes; bytes of all adapters, on the disk and in memory."""

    step: float
    specialist: float
    talking: float
    combining: float
    judging: float
    total: float
    parameters: int
    mixture_bytes: int
    adapter_bytes: int
    disk: int
    memory: int


def factor_bytes(config: ModelConfig) -> int:
    """One adapter's bytes at rank 1: float32, on the three projections of every feed-forward network."""
    return 4 * 3 * (config.hidden_size + config.intermediate_size) * config.num_hidden_layers


def rank_within(config: ModelConfig, specialists: int, limit: float = ADAPTERS) -> int:
    """The highest rank, within RANKS, at which the adapters of all specialists take `limit` bytes at most."""
    least, most = RANKS
    return max(least, min(most, int(limit // (specialists * factor_bytes(config)))))


def step_seconds(config: BranchConfig) -> float:
    """A step of the first specialist, measured here and thrown away; the one before it gets things ready."""
    with TemporaryDirectory() as place:
        trainer = Trainer(branch_learner(config, config.experts[0]), Path(place) / "run")
        trainer.train_step()
        begun = time.perf_counter()
        trainer.train_step()
        took = time.perf_counter() - begun
    del trainer
    gc.collect()
    return took


def costs_of(
    project: Project, config: ModelConfig, mixture: ModelConfig, pace: float, tokens: tuple[int, int, int]
) -> Costs:
    """All of it, after a step was measured in this process, whose peak memory is what training takes; the
    mixture in int8 comes on top, since what is freed stays with the process. `tokens`: of each
    expert's text that routers are fitted on, of each kind that is judged on, and at most of the base's answers."""
    routed, judged, talk = tokens
    count, specialists = len(project.experts), len(project.specialists)
    total = cost.parameters(mixture)
    rate = USUAL * product_rate(compute_dtype(), seconds=0.1)
    training = project.steps * pace
    combining = 2 * cost.body_parameters(config) * routed * count / rate + 2 * total / 0.5e9
    judging = judging_seconds(mixture, judged * count) if judged else 0.0
    talking = DECODING * 2 * cost.parameters(config) * talk / rate
    adapters = project.rank * factor_bytes(config) * specialists
    return Costs(
        step=pace,
        specialist=training,
        talking=talking,
        combining=combining,
        judging=judging,
        total=training * specialists + talking + combining + judging,
        parameters=total,
        mixture_bytes=2 * total,
        adapter_bytes=adapters,
        disk=2 * total + (1 + STATES) * adapters,
        memory=int(AGAIN * memory_of().get("peak", 4 * cost.parameters(config)) + ROUNDED * total),
    )


def times_read(project: Project, place: Path) -> dict[str, float]:
    """Of each specialist whose text is read more than twice, how often, roughly."""
    seen = project.steps * project.windows * project.window
    found = {}
    for expert in project.specialists:
        there = sum((place / file).stat().st_size for file in expert.data) / TOKEN
        found[expert.name] = seen / max(1.0, there)
    return {name: times for name, times in found.items() if times > 2}
