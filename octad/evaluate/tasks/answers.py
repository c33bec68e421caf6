"""Texts that a model writes for many prompts at once, and tasks that ask for a short right answer.

    texts = write(llm, ["2 + 2 ="], SamplingParams(temperature=0, max_tokens=8))      # one list of n texts a prompt
    measure_answers(llm, task)

All prompts go to the engine together, so it decodes as many at a time as its settings allow: a step with sixteen
sequences costs little more than one with a single sequence.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from octad.engine.llm import LLM
from octad.engine.loop import Stream
from octad.engine.params import SamplingParams, mix_seed
from octad.errors import DataError
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import GenerateTask, Prompt
from octad.evaluate.tasks.work import Work
from octad.guard import matches
from octad.telling import Share

PULSE = 1.0  # seconds between two looks at how far all of them are
PUNCTUATION = " \t\n.,;:!?…\"'`’‘“”«»()[]{}*_"


def write(
    llm: LLM,
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    progress: Share = lambda done: None,
) -> list[list[str]]:
    """The answers to each prompt (a text, or its ids), in order. Prompts lose their beginning where the context is too
    short for both; a seed is mixed with the prompt's number, so that no two share their draws."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    streams, texts = list[Stream](), list[list[str]]()
    begun = llm.engine.stats.generated_tokens
    try:
        for number, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            room = max(1, llm.engine.max_model_len - (own.max_tokens or 1))
            seeded = own if own.seed is None else replace(own, seed=mix_seed(own.seed, number))
            tokens = llm.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
            streams.append(llm.submit(tokens[-room:], seeded, deltas=False))
        for stream in streams:
            while not stream.ends_within(PULSE):
                progress(_share(streams, each, llm.engine.stats.generated_tokens - begun))
            output = stream.output()
            output.check()
            texts.append([answer.text for answer in output.outputs])
        progress(1.0)
        return texts
    finally:
        for stream in streams:
            stream.close()


def _share(streams: Sequence[Stream], each: Sequence[SamplingParams], written: int) -> float:
    """How much is done of the most that may be written, `written` tokens by now: all run side by side, so that those that
    have ended say little of those that go on."""
    most = sum(own.n * (own.max_tokens or 1) for own in each)
    ended = [(s, own) for s, own in zip(streams, each, strict=True) if s.ends_within(0)]
    saved = sum(own.n * (own.max_tokens or 1) for _, own in ended)
    saved -= sum(len(answer.token_ids) for s, _ in ended for answer in s.output().outputs)
    return min(1.0, (written + saved) / most)


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
