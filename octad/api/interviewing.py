"""Experts answer questions before their routers are fitted: where combining meets the engine.

interview(plan, progress)              # the recipe's `questions:` become conversations in the plan's calibration text
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octad.combine.preflight import Plan

LONGEST_ANSWER = 64  # tokens


def interview(plan: Plan, progress: Callable[[str, float], None]) -> None:
    """Each expert with questions is loaded as a dense model and answers them, drawn at a low temperature."""
    from octad.combine.conversations import asked, join

    for number, questions in asked(plan.recipe):
        tell = partial(progress, f"{plan.recipe.experts[number].name} answers")
        join(plan, number, questions, _answers(plan, number, questions, tell))


def _answers(plan: Plan, number: int, questions: list[str], tell: Callable[[float], None]) -> list[str]:
    from octad.checkpoint.load import load_model
    from octad.dist import compute_dtype
    from octad.engine.llm import LLM
    from octad.engine.params import CHAT_PENALTY, SamplingParams
    from octad.evaluate.tasks.answers import write

    llm = LLM((load_model(plan.members[number], compute_dtype()), plan.tokenizer))
    prompts = [plan.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
    params = SamplingParams(
        max_tokens=LONGEST_ANSWER,
        temperature=0.3,
        top_p=0.9,
        repetition_penalty=CHAT_PENALTY,
        seed=plan.recipe.router.seed,
    )
    return [text for (text,) in write(llm, prompts, params, tell)]
