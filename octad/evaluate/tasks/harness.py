"""lm-eval's tasks by name, run over octad's engine: `--tasks lm-eval:arc_easy,lm-eval:my_task.yaml`.

    HarnessTask.named("arc_easy", limit=100).measure(llm)      # {"arc_easy": [Measured("acc", ...), ...]}

lm-eval says what is asked and what is right; the numbers of single examples are taken from it and get the same intervals
as those of octad's own tasks. Its data come from the hub, or from local files where a task says so. lm-eval itself is
imported late: it brings in a great deal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

from octad.engine.llm import LLM
from octad.errors import DataError
from octad.evaluate.tasks.scores import Measured

PREFIX = "lm-eval:"


@dataclass(frozen=True)
class HarnessTask:
    """A task or group that lm-eval knows, or a task's YAML file."""

    name: str
    limit: int | None = None
    kind: str = "lm-eval"

    @classmethod
    def named(cls, name: str, limit: int | None = None) -> HarnessTask:
        """Raises DataError where lm-eval is not installed, or knows no such task."""
        if importlib.util.find_spec("lm_eval") is None:
            raise DataError(f"{PREFIX}{name}: lm-eval is not installed; pip install 'octad[eval]'")
        if not _is_file(name) and not _manager(own=True).match_tasks([name]):
            raise DataError(
                f"{PREFIX}{name}: lm-eval has no such task; `lm-eval ls tasks` tells which it has"
            )
        return cls(name, limit)

    def measure(self, llm: LLM) -> dict[str, list[Measured]]:
        """The measures of each task in it. Raises DataError where its data cannot be had."""
        import lm_eval

        from octad.evaluate.lm_eval_adapter import OctadLM

        try:
            found = lm_eval.simple_evaluate(
                OctadLM(llm),
                tasks=[self.name],
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
                task_manager=_manager(own=not _is_file(self.name)),
            )
        except Exception as error:  # whatever its many parts raise: no hub, a damaged YAML, a missing library
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{PREFIX}{self.name}: lm-eval cannot run it ({reason})") from error
        better = found["higher_is_better"]
        return {name: _measures(samples, better.get(name, {})) for name, samples in found["samples"].items()}


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@cache
def _manager(*, own: bool) -> Any:
    """lm-eval's index of tasks; with its own ones it takes seconds to make, so a file goes without."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)


def _measures(samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]) -> list[Measured]:
    """One for each metric that gives an example a number; of the perplexities, one thing thrice, bits_per_byte."""
    kinds = dict.fromkeys((sample["filter"], metric) for sample in samples for metric in sample["metrics"])
    measures = []
    for rule, metric in kinds:
        values = [sample[metric] for sample in samples if sample["filter"] == rule]
        label = metric if rule == "none" else f"{metric}, {rule}"
        if metric == "bits_per_byte":  # pairs of log-likelihood and bytes
            weights = [size for _, size in values]
            bits = [-nats / log(2) / size for nats, size in values]
            measures.append(Measured(label, bits, weights, higher_is_better=False))
        elif all(isinstance(value, (int, float)) for value in values):
            measures.append(Measured(label, values, higher_is_better=better.get(metric, True)))
    return measures
