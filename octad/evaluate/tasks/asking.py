"""Questions through the chat template: is the answer in their language, is it right, does it go in circles?

    measure_chat(llm, task)                             # language, right, no loop
    loops("again and again and again and again")        # True

An answer is *in the question's language* unless it is found to be in another one (which_language.py): a bare "Paris."
belongs to every language, an empty answer to none. It is *right* where it contains one of the example's answers, as whole
words. It *loops* where one to twenty words come several times running: a phrase three times, one or two words five times.
"""

from __future__ import annotations

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import RequestError
from octad.evaluate.tasks.answers import is_right, write
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import ChatQuestion, ChatTask, Prompt
from octad.evaluate.tasks.which_language import language_of
from octad.evaluate.tasks.work import Work

LONGEST_LOOP = 20  # words


def measure_chat(llm: LLM, task: ChatTask, work: Work | None = None) -> list[Measured]:
    """language and no loop: one value a question; right: one for each that has an exact answer."""
    texts = answers_of(llm, task, work or Work())
    pairs = list(zip(texts, task.examples, strict=True))
    found = [Measured("language", [int(in_language(text, asked)) for text, asked in pairs])]
    if exact := [(text, asked) for text, asked in pairs if asked.answers]:
        found.append(Measured("right", [int(right(text, asked)) for text, asked in exact]))
    return [*found, Measured("no loop", [int(not loops(text)) for text in texts])]


def answers_of(llm: LLM, task: ChatTask, work: Work) -> list[str]:
    """The likeliest answer to each question, a conversation of its own. Raises RequestError without a chat template."""
    if llm.tokenizer.chat_template is None:
        raise RequestError(f"{task.name}: the model has no chat template, so nobody can ask it anything")
    params = SamplingParams(
        temperature=0, max_tokens=task.max_tokens, repetition_penalty=task.repetition_penalty
    )
    prompts = [
        llm.tokenizer.encode_chat([{"role": "user", "content": asked.question}]) for asked in task.examples
    ]
    return [text for (text,) in write(llm, prompts, params, work.progress)]


def in_language(text: str, asked: ChatQuestion) -> bool:
    """Whether the answer is in the question's language, as far as can be told."""
    return bool(text.strip()) and language_of(text) in (None, asked.language)


def right(text: str, asked: ChatQuestion) -> bool:
    """Whether one of the answers stands in it."""
    return is_right(text, Prompt(prompt=asked.question, answers=asked.answers), "contains")


def loops(text: str) -> bool:
    """Whether the same words come several times running, anywhere in the text."""
    words = text.casefold().split()
    for size in range(1, LONGEST_LOOP + 1):
        times = 5 if size < 3 else 3
        alike = [a == b for a, b in zip(words, words[size:], strict=False)]
        run = 0
        for same in alike:
            run = run + 1 if same else 0
            if run >= size * (times - 1):
                return True
    return False
