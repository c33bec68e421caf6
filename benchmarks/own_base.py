"""What a mixture of `octad demo --base` is worth beyond bits per byte: HumanEval and five questions, it and its base.

    python benchmarks/own_base.py coder/mixture --quantize int8 --limit 40 --output benchmarks/results/own_base.json

Both speak from one loaded mixture (the base is its expert `general`, held exactly), greedily, weights rounded alike. The
first LIMIT problems of HumanEval (0: all 164, -1: none) as `octad evaluate --tasks humaneval` measures them; the
questions through the chat template. `--also` names more experts to measure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import command_line, hardware, save

from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.evaluate.tasks.humaneval import measure_code, read_humaneval
from octad.evaluate.tasks.scores import paired
from octad.evaluate.tasks.task import CodeTask
from octad.evaluate.tasks.work import Work

QUESTIONS = {
    "English": "What is the capital of France, and what is it known for? Answer in two sentences.",
    "French": "Pourquoi le ciel est-il bleu ? Réponds en deux phrases.",
    "German": "Was ist der Unterschied zwischen einem Vektor und einer Matrix? Antworte in zwei Sätzen.",
    "Python": "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "SQL": "Write an SQL query for the three customers with the highest sum of orders.amount.",
}
ANSWER = 80  # tokens


def main() -> None:
    """Measure, print the answers, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mixture")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--also", action="append", default=[])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    llm = LLM(options.mixture, quantize=options.quantize)
    names: list[str | None] = [None, "general", *options.also]
    found: dict[str, Any] = {"command": command_line(), "weights": options.quantize or "as they are"}
    found |= {"questions": QUESTIONS, "answers": {}}
    for name in names[:2]:
        llm.only(name)
        found["answers"][name or "mixture"] = ask(llm)
    for name, answers in found["answers"].items():
        for kind, text in answers.items():
            print(f"--- {name}, {kind}\n{text}\n", flush=True)
    if options.output is not None:  # in case that the rest is cut short
        save(options.output, found | {"hardware": hardware()})
    if options.limit >= 0:
        found["humaneval"] = problems(llm, names, options.limit)
        print(json.dumps(found["humaneval"]["scores"], indent=1))
    if options.output is not None:
        save(options.output, found | {"hardware": hardware()})


def ask(llm: LLM) -> dict[str, str]:
    """The answers to all questions, side by side."""
    params = SamplingParams(temperature=0, max_tokens=ANSWER, repetition_penalty=1.1)
    outputs = [llm.chat([{"role": "user", "content": question}], params) for question in QUESTIONS.values()]
    return {kind: output.outputs[0].text for kind, output in zip(QUESTIONS, outputs, strict=True)}


def problems(llm: LLM, names: list[str | None], limit: int) -> dict[str, Any]:
    """pass@1 of each, with intervals, and the mixture beside the others on the same problems."""
    task = read_humaneval()
    assert isinstance(task, CodeTask)
    task = task.model_copy(update={"examples": task.examples[:limit] if limit else task.examples})
    measured, seconds = {}, {}
    for name in names:
        begun = time.monotonic()
        llm.only(name)
        measured[name or "mixture"] = measure_code(llm, task, Work())[0]
        seconds[name or "mixture"] = round(time.monotonic() - begun, 1)
        print(name or "mixture", measured[name or "mixture"].score().to_dict(), file=sys.stderr, flush=True)
    mine = measured["mixture"]
    return {
        "problems": len(task.examples),
        "metric": mine.metric,
        "scores": {name: m.score().to_dict() for name, m in measured.items()},
        "passed": {name: [int(v) for v in m.values] for name, m in measured.items()},
        "mixture_less": {n: paired(mine, m).to_dict() for n, m in measured.items() if n != "mixture"},
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
