"""Multiple choice: which of the choices does the model find likeliest after the question?

    measure_choice(llm, task)       # [Measured("acc", ...), Measured("acc_norm", ...)]

Both scores are lm-eval's: acc takes the choice of the highest log-likelihood, acc_norm that of the highest per character,
since a longer text is less likely whatever it says. Of equals the first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from octad.engine.llm import LLM
from octad.evaluate.tasks.likelihood import encode_pair, log_likelihoods
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import ChoiceTask
from octad.evaluate.tasks.work import Work


def measure_choice(llm: LLM, task: ChoiceTask, work: Work | None = None) -> list[Measured]:
    """One value an example: 1 where the choice is right."""
    work = work or Work()
    pairs = [
        encode_pair(
            llm.tokenizer, task.template.replace("{question}", example.question), task.separator + choice
        )
        for example in task.examples
        for choice in example.choices
    ]
    found = iter(log_likelihoods(llm.model, pairs, progress=work.progress))
    nats = [[next(found).nats for _ in example.choices] for example in task.examples]
    lengths = [[len(choice) for choice in example.choices] for example in task.examples]
    right = [example.answer for example in task.examples]
    plain = [_least(n, [1] * len(n)) == r for n, r in zip(nats, right, strict=True)]
    even = [_least(n, length) == r for n, length, r in zip(nats, lengths, right, strict=True)]
    guessed = sum(1 / len(example.choices) for example in task.examples) / len(task.examples)
    return [
        Measured("acc", list(map(int, plain)), chance=guessed),
        Measured("acc_norm", list(map(int, even)), chance=guessed),
    ]


def _least(nats: Sequence[float], per: Sequence[int]) -> int:
    shares = [n / p for n, p in zip(nats, per, strict=True)]
    return shares.index(min(shares))
