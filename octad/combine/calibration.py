"""The text (or prompts) that each expert's part of the routers is fitted on, read and cut into windows.

calibration(recipe, recipe.experts[3], tokenizer).windows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from octad.combine.fit import Calibration
from octad.combine.recipe import ExpertSpec, Recipe
from octad.errors import DataError
from octad.text.corpus import open_documents
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window, read_windows

CONVERSATION = 128  # tokens of one, at the least, however short the windows of other text are


class Budget(Protocol):
    """How many tokens of a text, and how many at one place of it."""

    @property
    def tokens(self) -> int:
        """In all."""

    @property
    def window(self) -> int:
        """At one place."""


def check_files(recipe: Recipe) -> None:
    """Raises DataError where an expert's text is missing, or its first line damaged: before models are downloaded."""
    for spec in recipe.experts if recipe.reads_text else ():
        for file in spec.data:
            try:
                next(open_documents(recipe.resolve(file)).read(spec.field, 1), None)
            except DataError as error:
                raise DataError(f"expert {spec.name!r}: {error}") from None


def calibration(recipe: Recipe, spec: ExpertSpec, tokenizer: Tokenizer) -> Calibration:
    """The text (or prompts) of one expert, as windows. Raises DataError naming the expert."""
    longer = []
    if recipe.repair.method == "closed-form":
        files = [recipe.resolve(d) for d in spec.data]
        longer = text_windows(spec, files, recipe.repair, tokenizer)
    return replace(_for_routers(recipe, spec, tokenizer), longer=longer)


def _for_routers(recipe: Recipe, spec: ExpertSpec, tokenizer: Tokenizer) -> Calibration:
    if recipe.router.method == "prompts":
        return Calibration(
            prompt_windows(spec.positive_prompts, tokenizer), prompt_windows(spec.negative_prompts, tokenizer)
        )
    if recipe.router.method == "random":
        return Calibration([], [])
    return Calibration(
        text_windows(spec, [recipe.resolve(d) for d in spec.data], recipe.router, tokenizer), []
    )


def text_windows(
    spec: ExpertSpec, files: Sequence[str], budget: Budget, tokenizer: Tokenizer
) -> list[Window]:
    """The calibration windows of one expert's files."""
    try:
        return read_windows(
            files,
            tokenizer,
            tokens=budget.tokens,
            window=budget.window,
            field=spec.field,
            anywhere=True,
            conversation=CONVERSATION,
        )
    except DataError as error:
        raise DataError(f"expert {spec.name!r}: {error}") from None


def prompt_windows(prompts: Sequence[str], tokenizer: Tokenizer) -> list[Window]:
    """One window a prompt."""
    return [Window(tuple(tokenizer.encode(p, parse_special=False)), 0, i) for i, p in enumerate(prompts)]
