"""Tasks by name: those that come with octad, HumanEval where its package is installed, and files.

    find_task("octad-code"), find_task("humaneval"), find_task("my-questions.yaml")

octad's own are small and easy: they tell small models apart on a laptop and say nothing about large ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from octad.errors import DataError, nearest
from octad.evaluate.tasks.humaneval import read_humaneval
from octad.evaluate.tasks.task import SUFFIXES, ContinuationTask, Passage, Task, read_task

DATA = Path(str(files("octad.evaluate.tasks"))) / "data"
HELD_OUT = Path(str(files("octad"))) / "demo" / "data"
LANGUAGES = ("literature", "french", "german", "spanish")


def own_code() -> Task:
    """Easy functions, in HumanEval's format."""
    return read_task(DATA / "octad-code.yaml")


def own_choice() -> Task:
    """Four-way questions about what the demonstration's specialists read."""
    return read_task(DATA / "octad-choice.yaml")


def own_chat() -> Task:
    """Short questions in English, French, German and Spanish."""
    return read_task(DATA / "octad-chat.yaml")


def own_writing() -> Task:
    """The demonstration's held-out prose, in four languages."""
    passages = [
        Passage(text=json.loads(line)["text"], group=language)
        for language in LANGUAGES
        for line in (HELD_OUT / language / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return ContinuationTask(name="octad-writing", examples=tuple(passages))


NAMED: dict[str, Callable[[], Task]] = {
    "octad-code": own_code,
    "octad-choice": own_choice,
    "octad-writing": own_writing,
    "humaneval": read_humaneval,
    "octad-chat": own_chat,
}


def find_task(reference: str) -> Task:
    """The task of that name or in that file. Raises DataError."""
    if reference in NAMED:
        return NAMED[reference]()
    path = Path(reference).expanduser()
    if path.is_file() or reference.endswith(SUFFIXES):
        return read_task(path)
    near = nearest(reference, NAMED)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMED)}, lm-eval:NAME, and files"
    raise DataError(f"{reference}: no such task or file; {hint}")
