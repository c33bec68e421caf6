"""Conversations to calibrate on: questions that an expert is asked through the chat template, and what it answered.

    for number, questions in asked(plan.recipe):          # of the experts with `questions:` in the recipe
        answers = ...                                     # whoever can run a model lets the expert itself answer
        join(plan, number, questions, answers)

Without conversations in the generalist's text, routers take a question that names a place or a language for text of
that language, and the answer drifts there. This room runs no model as a whole; `octad combine` has the engine do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from octad.combine.calibration import CONVERSATION
from octad.combine.preflight import Plan
from octad.combine.recipe import Recipe
from octad.errors import DataError, RecipeError
from octad.guard import read_text
from octad.text.rows import Document
from octad.text.windows import Window, windows_of

WITHOUT = (
    "there is no conversation in its text: in chat, a question about France may be answered in French; give some, or"
    " add to it in the recipe: questions: octad"
)
BUNDLED = "octad"  # what `questions:` calls the list that comes with octad


def asked(recipe: Recipe) -> Iterator[tuple[int, list[str]]]:
    """(number of the expert, its questions). Raises DataError for a file that cannot be read or holds none."""
    for number, spec in enumerate(recipe.experts):
        if spec.questions and recipe.router.method in ("ridge", "logistic"):
            found = [line for name in spec.questions for line in _lines(recipe, name)]
            if not found:
                raise DataError(f"expert {spec.name!r}: {', '.join(spec.questions)}: holds no question")
            yield number, found


def check(plan: Plan) -> None:
    """Notes a generalist that holds conversations, but has none in its text. Raises RecipeError where questions are given
    and nobody can be asked, or a generalist is favoured that is not there, DataError where they cannot be read."""
    answering = [number for number, _ in asked(plan.recipe)]
    if answering and plan.tokenizer.chat_template is None:
        name = plan.recipe.experts[answering[0]].name
        raise RecipeError(f"expert {name!r}: questions: the model has no chat template; leave them out")
    number = plan.generalist
    if number is None and plan.recipe.router.generalist:
        raise RecipeError(
            f"router: generalist {plan.recipe.router.generalist:g}: no expert's model is base; leave it out"
        )
    if number is None or number in answering or plan.tokenizer.chat_template is None:
        return
    if plan.recipe.router.method in ("ridge", "logistic") and not holds_conversations(plan, number):
        plan.note(plan.recipe.experts[number].name, WITHOUT)


def join(plan: Plan, number: int, questions: Sequence[str], answers: Sequence[str]) -> None:
    """Put the conversations into the expert's calibration text: up to half of its tokens, which stay as many."""
    router, name = plan.recipe.router, plan.recipe.experts[number].name
    chats: list[Document] = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(questions, answers, strict=True)
    ]
    budget = max(router.tokens // 2, 2)
    windows = windows_of(
        chats,
        plan.tokenizer,
        tokens=budget,
        window=router.window,
        label=f"expert {name!r}: questions",
        anywhere=True,
        conversation=CONVERSATION,
    )
    put(plan, number, windows)


def put(plan: Plan, number: int, windows: Sequence[Window]) -> None:
    """Put windows into an expert's calibration text in the place of its last ones, so that it stays as long."""
    left = plan.recipe.router.tokens - sum(len(window.ids) for window in windows)
    own = list(_first(plan.calibrations[number].windows, left))
    plan.calibrations[number] = replace(plan.calibrations[number], windows=[*own, *windows])


def holds_conversations(plan: Plan, number: int) -> bool:
    """Whether a control token, as a chat template writes them, stands in the expert's calibration text."""
    control = set(plan.tokenizer.special_ids)
    return any(control.intersection(window.ids) for window in plan.calibrations[number].windows)


def _first(windows: Sequence[Window], tokens: int) -> Iterator[Window]:
    """As many of them as have these tokens."""
    for window in windows:
        tokens -= len(window.ids)
        if tokens < 0:
            return
        yield window


def bundled_questions() -> list[str]:
    """Those that come with octad: English, of places and languages, programs, numbers, letters to write."""
    return _lines_of(Path(str(files("octad.combine"))) / "questions.txt")


def _lines(recipe: Recipe, name: str) -> list[str]:
    """One question a line; the bundled list by its name."""
    return bundled_questions() if name == BUNDLED else _lines_of(Path(recipe.resolve(name)).expanduser())


def _lines_of(path: Path) -> list[str]:
    text = read_text(path, what=" questions")
    return [line.strip() for line in text.splitlines() if line.strip()]
