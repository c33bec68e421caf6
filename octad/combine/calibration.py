"""The text (or prompts) that each expert's part of the routers is fitted on, read and cut into windows.

calibration(recipe, recipe.experts[3], tokenizer).windows
"""

from __future__ import annotations

from collections.abc import Sequence

from octad.combine.fit import Calibration
from octad.combine.recipe import ExpertSpec, Recipe, RouterSpec
from octad.errors import DataError
from octad.text.corpus import open_documents
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window, read_windows


def check_files(recipe: Recipe) -> None:
    """Raises DataError where an expert's text is missing, or its first line damaged: before models are downloaded."""
    for spec in recipe.experts if recipe.router.method in ("ridge", "logistic") else ():
        for file in spec.data:
            try:
                next(open_documents(recipe.resolve(file)).read(spec.field, 1), None)
            except DataError as error:
                raise DataError(f"expert {spec.name!r}: {error}") from None


def calibration(recipe: Recipe, spec: ExpertSpec, tokenizer: Tokenizer) -> Calibration:
    """The text (or prompts) of one expert, as windows. Raises DataError naming the expert."""
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
    spec: ExpertSpec, files: Sequence[str], router: RouterSpec, tokenizer: Tokenizer
) -> list[Window]:
    """The calibration windows of one expert's files."""
    try:
        return read_windows(
            files, tokenizer, tokens=router.tokens, window=router.window, field=spec.field, anywhere=True
        )
    except DataError as error:
        raise DataError(f"expert {spec.name!r}: {error}") from None


def prompt_windows(prompts: Sequence[str], tokenizer: Tokenizer) -> list[Window]:
    """One window a prompt."""
    return [Window(tuple(tokenizer.encode(p, parse_special=False)), 0, i) for i, p in enumerate(prompts)]
