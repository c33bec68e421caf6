"""Texts that a model writes for many prompts at once, and tasks that ask for a short right answer.

    texts = write(llm, ["2 + 2 ="], SamplingParams(temperature=0, max_tokens=8))      # one list of n texts a prompt
    measure_answers(llm, task)

All prompts go to the engine together, so it decodes as many at a time as its settings allow: a step with sixteen
sequences costs little more than one with a single sequence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import DataError
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import GenerateTask, Prompt
from octad.evaluate.tasks.work import Work
from octad.guard import matches

PUNCTUATION = " \t\n.,;:!?…\"'`’‘“”«»()[]{}*_"


def write(
    llm: LLM,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    progress: Callable[[float], None] = lambda done: None,
) -> list[list[str]]:
    """The answers to each prompt (a text, or its ids), in order. Prompts lose their beginning where the context is too
    short for both; a seed is counted on from prompt to prompt, so that no two share their draws."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    engine, ids = llm.engine, [f"task-{number}" for number in range(len(prompts))]
    try:
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            tokens = llm.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
            room = max(1, engine.max_model_len - (own.max_tokens or 1))
            seeded = own if own.seed is None else replace(own, seed=own.seed + number * own.n)
            engine.add_request(ids[number], tokens[-room:], seeded)
        done, total = 0, sum(own.n for own in each)
        while engine.has_unfinished():
            done += sum(delta.finish_reason is not None for delta in engine.step())
            progress(done / total)
        return [[answer.text for answer in engine.output(request).outputs] for request in ids]
    finally:
        for request in ids:
            engine.abort(request)


def measure_answers(llm: LLM, task: GenerateTask, work: Work | None = None) -> list[Measured]:
    """One value an example: 1 where the likeliest answer is right."""
    params = SamplingParams(temperature=0, max_tokens=task.max_tokens, stop=task.stop)
    prompts = [example.prompt for example in task.examples]
    texts = write(llm, prompts, params, (work or Work()).progress)
    values = [
        int(is_right(text, example, task.match))
        for (text,), example in zip(texts, task.examples, strict=True)
    ]
    return [Measured(f"{task.match} match" if task.match == "exact" else task.match, values)]


def is_right(text: str, example: Prompt, match: str) -> bool:
    """Whether an answer counts."""
    if example.regex is not None:
        return matches(example.regex, text, "a task's example", "search", DataError)
    found, wanted = normalise(text), [normalise(answer) for answer in example.answers]
    if match == "exact":
        return found in wanted
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", found) for answer in wanted if answer)


def normalise(text: str) -> str:
    """Compatible characters made one (NFKC), no case, single blanks, no punctuation around the whole."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(PUNCTUATION)
