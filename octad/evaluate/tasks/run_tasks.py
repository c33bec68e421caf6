"""Tasks and contestants together: what `octad evaluate --tasks` does.

    rows = run_tasks("mixture/", ["humaneval", "questions.yaml", "lm-eval:arc_easy"], members=True)
    rows[0]["metric"], rows[0]["scores"]["mixture top-2"]["value"]

One row a measure, plain data for the report. All tasks are read, and a sandbox tried, before the first weight is: a
mistake costs no waiting. Each contestant does all tasks before the next is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from octad.engine.llm import LLM
from octad.errors import RequestError
from octad.evaluate.tasks.answers import measure_answers
from octad.evaluate.tasks.asking import measure_chat
from octad.evaluate.tasks.catalogue import find_task
from octad.evaluate.tasks.choice import measure_choice
from octad.evaluate.tasks.entrants import Entrant, lineup
from octad.evaluate.tasks.harness import PREFIX, HarnessTask
from octad.evaluate.tasks.humaneval import measure_code
from octad.evaluate.tasks.scores import Measured, paired
from octad.evaluate.tasks.task import ChatTask, ChoiceTask, CodeTask, ContinuationTask, GenerateTask, Task
from octad.evaluate.tasks.work import Work
from octad.evaluate.tasks.writing import (
    choose_candidates,
    cut_passages,
    human_diversity,
    measure_continuation,
)
from octad.sandbox.run import Sandbox
from octad.telling import Progress, quiet

HUMAN = "human text"


@dataclass
class Table:
    """One task's measures: results[metric][contestant]."""

    name: str
    kind: str
    extra: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Measured]] = field(default_factory=dict)

    def add(self, contestant: str, measures: Iterable[Measured]) -> None:
        """What one contestant reached."""
        for measured in measures:
            self.results.setdefault(measured.metric, {})[contestant] = measured

    def rows(self, of: str) -> list[dict[str, Any]]:
        """For JSON, one row a measure: scores with intervals, and `of` against each other contestant."""
        return [self._row(metric, by, of) for metric, by in self.results.items()]

    def _row(self, metric: str, by: dict[str, Measured], of: str) -> dict[str, Any]:
        mine = by[of]
        against = [name for name in by if name != of and mine.higher_is_better is not None]
        return {
            "name": self.name,
            "kind": self.kind,
            "metric": metric,
            "examples": len(mine.values),
            "higher_is_better": mine.higher_is_better,
            "chance": mine.chance,
            "scores": {name: measured.score().to_dict() for name, measured in by.items()},
            "differences": [_difference(of, mine, name, by[name]) for name in against],
            **self.extra,
        }


def _difference(of: str, mine: Measured, against: str, theirs: Measured) -> dict[str, Any]:
    found = paired(mine, theirs)
    return {"of": of, "against": against, "difference": found.value, "low": found.low, "high": found.high}


def run_tasks(
    model: str | Path,
    references: Sequence[str],
    *,
    members: bool = False,
    limit: int | None = None,
    samples: int | None = None,
    weak_sandbox: bool = False,
    dtype: str = "auto",
    progress: Progress = quiet,
) -> list[dict[str, Any]]:
    """The rows of all tasks. `limit`: the first so many examples of each; `samples`: answers to each programming problem.

    Raises DataError, RequestError, SandboxError or CheckpointError."""
    tasks = read_tasks(references, limit=limit, samples=samples)
    sandbox = cache(partial(Sandbox, weak=weak_sandbox))  # tried once, and only where programs run
    tables = {task.name: _table(task, sandbox) for task in tasks}
    mixture, notes = "", dict[str, str]()
    for entrant in lineup(model, members=members, dtype=dtype):
        mixture = mixture or entrant.name
        notes |= {entrant.name: entrant.note} if entrant.note else {}
        for number, task in enumerate(tasks):
            tell = partial(_share, partial(progress, entrant.name), number, len(tasks))
            _judge(tables, entrant, task, Work(tell, sandbox))
        progress(entrant.name, 1.0)
    return [row | {"notes": notes} for table in tables.values() for row in table.rows(mixture)]


def read_tasks(
    references: Sequence[str], *, limit: int | None = None, samples: int | None = None
) -> list[Task | HarnessTask]:
    """The tasks themselves. Raises DataError, or RequestError for none, or for two of one name."""
    tasks: list[Task | HarnessTask] = []
    for reference in references:
        if reference.startswith(PREFIX):
            tasks.append(HarnessTask.named(reference.removeprefix(PREFIX), limit))
        else:
            tasks.append(_changed(find_task(reference), limit, samples))
    names = [task.name for task in tasks]
    if not names:
        raise RequestError("--tasks: names no task")
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise RequestError(f"--tasks: {doubled} is there twice; give each task a name of its own")
    return tasks


def _changed(task: Task, limit: int | None, samples: int | None) -> Task:
    """The task with what the command line says put in the place of its own settings."""
    changes: dict[str, Any] = {} if limit is None else {"examples": task.examples[:limit]}
    if samples is not None and isinstance(task, CodeTask):
        changes["samples"] = samples
    return task.model_copy(update=changes)


def _table(task: Task | HarnessTask, sandbox: Callable[[], Sandbox]) -> Table:
    """An empty table. Makes the mistakes that the task can make: a machine that cannot confine, documents too short."""
    table = Table(task.name, task.kind)
    if isinstance(task, CodeTask):
        table.extra["sandbox"] = str(sandbox().walls)
    elif isinstance(task, ContinuationTask):
        choose_candidates(cut_passages(task), task)
    return table


def _judge(tables: dict[str, Table], entrant: Entrant, task: Task | HarnessTask, work: Work) -> None:
    """One contestant through one task; a group of lm-eval's adds a table for each task in it."""
    if isinstance(task, HarnessTask):
        for name, measures in task.measure(entrant.llm).items():
            tables.setdefault(name, Table(name, task.kind)).add(entrant.name, measures)
        return
    tables[task.name].add(entrant.name, _measure(entrant.llm, task, work))
    if isinstance(task, ContinuationTask):
        tables[task.name].add(HUMAN, [human_diversity(task)])


def _measure(llm: LLM, task: Task, work: Work) -> list[Measured]:
    if isinstance(task, CodeTask):
        return measure_code(llm, task, work)
    if isinstance(task, ChoiceTask):
        return measure_choice(llm, task, work)
    if isinstance(task, GenerateTask):
        return measure_answers(llm, task, work)
    if isinstance(task, ChatTask):
        return measure_chat(llm, task, work)
    return measure_continuation(llm, task, work)


def _share(tell: Callable[[float], None], number: int, of: int, done: float) -> None:
    """Progress within task `number` as progress of all."""
    tell((number + done) / of)
