"""Text that an expert writes itself, to fit the routers on beside its owner's.

    for number, tokens in writing(plan.recipe):           # of the experts with `writes:` in the recipe
        begun = beginnings(plan, number, tokens)
        texts = ...                                       # whoever can run a model has the expert go on from there
        add(plan, number, begun, texts)

Routers fitted on text of a few sources know these sources; an expert has seen all that it was trained on, and what it
writes is of all these kinds, however little sense it makes. On sources that nobody calibrated on such text alone is as
good as real text of other sources, and both together are better (docs/log.md). This room runs no model as a whole;
`octad combine` has the engine do it.

What the base would write is text of every kind, code and stories, which other experts know better: it does not write.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from octad.combine.conversations import put
from octad.combine.preflight import Plan
from octad.combine.recipe import Recipe
from octad.errors import RecipeError
from octad.text.rows import Document
from octad.text.windows import windows_of

LENGTH = 48  # tokens of one text: many short ones
GIVEN = (1, 2, 3)  # tokens that it begins with


def writing(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """(number of the expert, how many tokens it is to write)."""
    for number, spec in enumerate(recipe.experts):
        if spec.writes:
            yield number, spec.writes


def check(plan: Plan) -> None:
    """Raises RecipeError where the base is to write."""
    for number, _ in writing(plan.recipe):
        if plan.members[number] is plan.base:
            name = plan.recipe.experts[number].name
            raise RecipeError(
                f"expert {name!r}: writes: the base writes text of every kind, and routers would send it all of that;"
                " leave it out"
            )


def beginnings(plan: Plan, number: int, tokens: int) -> list[list[int]]:
    """The first tokens of lines of an expert's calibration text (not of conversations), each to be gone on from: as many
    as make this much text. Raises RecipeError where it has no line."""
    draw = random.Random(plan.recipe.router.seed)
    control = set(plan.tokenizer.special_ids)
    lines = [
        window.ids[start:]
        for window in plan.calibrations[number].windows
        if control.isdisjoint(window.ids)
        for start in _line_starts(plan, window.ids)
    ]
    if not lines:
        name = plan.recipe.experts[number].name
        raise RecipeError(
            f"expert {name!r}: writes: all its text is conversations, and there is no line to begin with; leave it out"
        )
    return [list(draw.choice(lines)[: draw.choice(GIVEN)]) for _ in range(-(-tokens // LENGTH))]


def add(plan: Plan, number: int, begun: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    """Put what an expert wrote into its calibration text, which stays as long."""
    spec, router = plan.recipe.experts[number], plan.recipe.router
    whole: list[Document] = [
        plan.tokenizer.decode(list(ids)) + text for ids, text in zip(begun, texts, strict=True)
    ]
    label = f"expert {spec.name!r}: writes"
    windows = windows_of(whole, plan.tokenizer, tokens=spec.writes, window=router.window, label=label)
    put(plan, number, windows)


def _line_starts(plan: Plan, ids: Sequence[int]) -> list[int]:
    """Where a line begins in these tokens, the first of them taken for one."""
    ends = [i for i, token in enumerate(ids[:-1]) if plan.tokenizer.decode([token]).endswith("\n")]
    return [0, *(i + 1 for i in ends)]
