"""Experts answer questions and write text before the routers are fitted: where combining meets the engine.

interview(plan, progress)      # the recipe's `questions:` and `writes:` become calibration text in the plan
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octad.combine.preflight import Plan
    from octad.engine.llm import LLM

LONGEST_ANSWER = 64  # tokens


def interview(plan: Plan, progress: Callable[[str, float], None]) -> None:
    """Each expert with questions is loaded as a dense model and answers them, drawn at a low temperature; each that is to
    write goes on from beginnings of its text, drawn as it would speak."""
    from octad.combine.conversations import asked, join
    from octad.combine.own_text import add, beginnings, writing

    for number, questions in asked(plan.recipe):
        tell = partial(progress, f"{plan.recipe.experts[number].name} answers")
        seed = plan.recipe.router.seed
        join(plan, number, questions, answers(_expert(plan, number), questions, tell, seed=seed))
    for number, tokens in writing(plan.recipe):
        tell = partial(progress, f"{plan.recipe.experts[number].name} writes")
        begun = beginnings(plan, number, tokens)
        add(plan, number, begun, _texts(plan, number, begun, tell))


def answers(
    llm: LLM,
    questions: Sequence[str],
    tell: Callable[[float], None] = lambda done: None,
    *,
    longest: int = LONGEST_ANSWER,
    seed: int = 0,
) -> list[str]:
    """What a model answers to each question through its chat template, `longest` tokens at most."""
    from octad.engine.params import CHAT_PENALTY, SamplingParams
    from octad.evaluate.tasks.answers import write

    prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": q}]) for q in questions]
    params = SamplingParams(
        max_tokens=longest, temperature=0.3, top_p=0.9, repetition_penalty=CHAT_PENALTY, seed=seed
    )
    return [text for (text,) in write(llm, prompts, params, tell)]


def _texts(plan: Plan, number: int, begun: list[list[int]], tell: Callable[[float], None]) -> list[str]:
    from octad.combine.own_text import LENGTH
    from octad.engine.params import SamplingParams
    from octad.evaluate.tasks.answers import write

    params = SamplingParams(
        max_tokens=LENGTH, min_tokens=LENGTH // 2, top_p=0.95, seed=plan.recipe.router.seed
    )
    return [text for (text,) in write(_expert(plan, number), begun, params, tell)]


def _expert(plan: Plan, number: int) -> LLM:
    """An expert as a model of its own."""
    from octad.checkpoint.load import load_model
    from octad.dist import compute_dtype
    from octad.engine.llm import LLM

    return LLM((load_model(plan.members[number], compute_dtype()), plan.tokenizer))
