"""What can be known of a run before it begins: that its text is there, and about how long it takes.

check_text(config, config.experts)           # every file of every specialist; DataError
branch_seconds(config, config.experts)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from octad.checkpoint.load import open_source
from octad.dist import product_rate
from octad.errors import DataError, RecipeError
from octad.guard import exists
from octad.model import cost
from octad.text.corpus import HUB, open_all
from octad.train.learner import compute_settings
from octad.train.run_config import BranchConfig, SpecialistSpec, TrainConfig
from octad.train.sections import RunSpec
from octad.train.trainer import USUAL


def check_text(config: BranchConfig, specialists: Iterable[SpecialistSpec]) -> None:
    """Open all files and read the first document of each, so that the last specialist's mistake is seen before the first
    one is trained. Raises DataError or RecipeError naming the specialist."""
    for specialist in specialists:
        for references in (specialist.data, specialist.held_out):
            _open(specialist.name, config, references, specialist.field)
        start = specialist.start
        if start is not None and start.startswith(("/", ".")) and not exists(config.directory / start):
            raise RecipeError(f"{specialist.name}: start: {start}: no such directory")
    if config.keep is not None:
        _open("keep", config, config.keep.data, config.keep.field)
    for name, domain in config.evaluate.domains.items():
        _open(f"evaluate.domains.{name}", config, domain.data, None)


def check_sources(config: TrainConfig) -> None:
    """The same of a run's own sources and held-out text, before its model is loaded. Raises DataError."""
    for source in config.data.sources:
        _open(f"data source {source.name!r}", config, source.data, source.field)
    for name, domain in config.evaluate.domains.items():
        _open(f"evaluate.domains.{name}", config, domain.data, None)


def _open(label: str, config: RunSpec, references: Sequence[str], field: str | None) -> None:
    """All files of some text are there, and the first document of each can be read; of the hub nothing is fetched."""
    local = [config.resolve(reference) for reference in references if not reference.startswith(HUB)]
    try:
        for part in open_all(local):
            if field is not None:
                next(part.read(field, 1000), None)
    except DataError as error:
        raise DataError(f"{label}: {error}") from None


def branch_seconds(config: BranchConfig, specialists: Sequence[SpecialistSpec]) -> float:
    """All steps of these specialists, one after another, at the usual share of this machine's rate."""
    source = open_source(config.resolve(config.base))
    dtype, device = compute_settings(config)
    steps = sum(specialist.steps or config.steps for specialist in specialists)
    flops = cost.training_flops(source.config, {}, config.data.window)
    rate = USUAL * product_rate(dtype, device, seconds=0.1)
    return steps * config.batch.windows * config.data.window * flops / rate
