"""Writing: how well a model goes on with texts that people wrote.

    measure_continuation(llm, task)

Four numbers from the same held-out documents, one passage each; docs/tasks.md says why these.

- bits_per_byte of the true continuation, given what stands before it.
- identified: is the true continuation told from those of other documents of the same group? With one candidate drawn
  from p(c | x) and the others from p(c), the best decision is the largest p(c | x) / p(c): what is judged is what the
  model takes from the text before, not how plain a candidate is.
- diversity of the model's own continuations, beside human text of the same length: the share of 2-, 3- and 4-grams of
  words that are no repeats, multiplied (Su et al. 2022). A model that loops is far below what people write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod
from random import Random

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import DataError
from octad.evaluate.tasks.answers import write
from octad.evaluate.tasks.likelihood import encode_pair, log_likelihoods
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import ContinuationTask
from octad.evaluate.tasks.work import Work


@dataclass(frozen=True)
class Cut:
    """A passage: what is given, its true continuation, the human text that samples are held against."""

    given: str
    true: str
    human: str
    group: str


def measure_continuation(llm: LLM, task: ContinuationTask, work: Work | None = None) -> list[Measured]:
    """bits_per_byte, identified, diversity: one value a passage. Raises DataError where a group is too small."""
    work, cuts = work or Work(), cut_passages(task)
    candidates = choose_candidates(cuts, task)
    pairs = [
        encode_pair(llm.tokenizer, cut.given, cuts[c].true)
        for cut, own in zip(cuts, candidates, strict=True)
        for c in own
    ]
    alone = [encode_pair(llm.tokenizer, "", cut.true) for cut in cuts]
    scored = log_likelihoods(llm.model, pairs + alone, progress=work.part(0, 0.6).progress)
    nats = [found.nats for found in scored]
    width = task.distractors + 1
    rows = [nats[i : i + width] for i in range(0, len(pairs), width)]  # the true one first
    prior = nats[len(pairs) :]
    gains = [
        [prior[c] - n for c, n in zip(own, row, strict=True)]
        for own, row in zip(candidates, rows, strict=True)
    ]
    samples = _samples(llm, task, cuts, work.part(0.6, 1))
    sizes = [len(cut.true.encode()) for cut in cuts]
    bits = [row[0] / log(2) / size for row, size in zip(rows, sizes, strict=True)]
    return [
        Measured("bits_per_byte", bits, sizes, higher_is_better=False),
        Measured("identified", [int(gain[0] > max(gain[1:])) for gain in gains], chance=1 / width),
        Measured("diversity", [diversity(text) for text in samples], higher_is_better=None),
    ]


def human_diversity(task: ContinuationTask) -> Measured:
    """The diversity of the documents themselves."""
    return Measured("diversity", [diversity(cut.human) for cut in cut_passages(task)], higher_is_better=None)


def cut_passages(task: ContinuationTask) -> list[Cut]:
    """The passages of the documents that are long enough. Raises DataError where fewer than two are."""
    cuts = []
    for passage in task.examples:
        text = passage.text.strip()
        begin = _blank_before(text, task.given)
        end, last = _blank_before(text, begin + task.length), _blank_before(text, begin + task.written)
        if len(text) >= task.given + max(task.length, task.written) and 0 < begin < min(end, last):
            cuts.append(Cut(text[:begin], text[begin:end], text[begin:last], passage.group))
    if len(cuts) < 2:
        needed = task.given + max(task.length, task.written)
        raise DataError(
            f"{task.name}: {len(cuts)} documents have {needed} characters; two or more are needed"
        )
    return cuts


def choose_candidates(cuts: Sequence[Cut], task: ContinuationTask) -> list[list[int]]:
    """For each passage the numbers of the candidates: its own first, then the distractors', drawn by the seed."""
    groups: dict[str, list[int]] = {}
    for number, cut in enumerate(cuts):
        groups.setdefault(cut.group, []).append(number)
    for name, members in groups.items():
        if len(members) <= task.distractors:
            what = f"group {name!r} has" if name else "there are"
            raise DataError(
                f"{task.name}: {what} {len(members)} passages that are long enough, and distractors:"
                f" {task.distractors} needs {task.distractors + 1}; give more documents or ask for fewer distractors"
            )
    chosen = []
    for number, cut in enumerate(cuts):
        others = [other for other in groups[cut.group] if other != number]
        draw = Random(f"{task.seed} {number}")
        chosen.append([number, *draw.sample(others, task.distractors)])
    return chosen


def diversity(text: str) -> float:
    """The product over n = 2, 3, 4 of the share of different n-grams of words; 1 for fewer words than n."""
    words = text.split()
    shares = []
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return prod(shares)


def _samples(llm: LLM, task: ContinuationTask, cuts: Sequence[Cut], work: Work) -> list[str]:
    """One continuation a passage, with as many words as the human text has where the model wrote so many."""
    params = [
        SamplingParams(
            temperature=task.temperature,
            top_p=task.top_p,
            seed=task.seed,
            max_tokens=len(llm.tokenizer.encode(cut.human, parse_special=False)),
            ignore_eos=True,
        )
        for cut in cuts
    ]
    texts = write(llm, [cut.given for cut in cuts], params, work.progress)
    return [
        " ".join(text.split()[: len(cut.human.split())]) for (text,), cut in zip(texts, cuts, strict=True)
    ]


def _blank_before(text: str, most: int) -> int:
    """The last place at or before `most` where a blank begins; `most` where there is none."""
    place = min(most, len(text))
    while place > 0 and not (text[place : place + 1].isspace() and not text[place - 1].isspace()):
        place -= 1
    return place or most
