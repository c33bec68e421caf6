"""What a mixture of `octad demo --base` is worth beyond bits per byte, beside its base, its members and their soup.

    python benchmarks/own_base.py coder/mixture --who mixture,general,soup --tasks humaneval,octad-chat:104 -o out.json

All speak from one loaded mixture in int8, greedily (the base is its expert `general`, held exactly). A task is NAME or
NAME:LIMIT, every so manieth example, so that all languages are in the sample. What is measured is kept after each task of
each, and the same command goes on there; `--ask` only has QUESTIONS answered.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measure import command_line, hardware, save

from octad.checkpoint.load import open_source
from octad.dist import compute_dtype
from octad.engine.llm import LLM
from octad.engine.params import CHAT_PENALTY, SamplingParams
from octad.evaluate.contestants import Soup
from octad.evaluate.tasks import asking, humaneval, writing
from octad.evaluate.tasks.catalogue import find_task
from octad.evaluate.tasks.entrants import alone, soup
from octad.evaluate.tasks.scores import Measured, paired
from octad.evaluate.tasks.task import Task
from octad.evaluate.tasks.work import Work

QUESTIONS = {
    "English": "What is the capital of France, and what is it known for? Answer in two sentences.",
    "French": "Pourquoi le ciel est-il bleu ? Réponds en deux phrases.",
    "German": "Was ist der Unterschied zwischen einem Vektor und einer Matrix? Antworte in zwei Sätzen.",
    "Spanish": "¿Qué ciudad es la capital de Perú y por qué es conocida? Responde en dos frases.",
    "Python": "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "SQL": "Write an SQL query for the three customers with the highest sum of orders.amount.",
    "letter": "Write a short letter to my neighbour: I am away next week, please water the plants.",
}
ANSWER = 120  # tokens
MEASURES: dict[str, Callable[..., list[Measured]]] = {
    "code": humaneval.measure_code,
    "chat": asking.measure_chat,
    "continuation": writing.measure_continuation,
}


def main() -> None:
    """Measure what is not there yet, print, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mixture")
    parser.add_argument("--who", default="mixture,general")
    parser.add_argument("--tasks", default="humaneval")
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    found = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {"tasks": {}}
    found |= {"hardware": hardware(), "weights": "int8"}
    found.setdefault("commands", []).append(command_line())
    names = options.who.split(",")
    with entrants(options.mixture) as entrant:
        for spec in [] if options.ask else options.tasks.split(","):
            for name in names:
                if name not in found["tasks"].setdefault(spec, {}):
                    found["tasks"][spec][name] = measured(entrant(name), sampled(spec))
                    save(options.output, found)
                print(spec, name, found["tasks"][spec][name]["scores"], file=sys.stderr, flush=True)
        for name in names if options.ask else []:
            found.setdefault("answers", {})[name] = answers = ask(entrant(name))
            print(*(f"--- {name}, {kind}\n{text}\n" for kind, text in answers.items()), sep="\n")
    found["less"] = {spec: beside(of) for spec, of in found["tasks"].items()}
    save(options.output, found)
    print(json.dumps(found["less"], indent=1))


@contextmanager
def entrants(mixture: str) -> Iterator[Callable[[str], LLM]]:
    """A function from a name to who speaks: the mixture, one of its experts, or their soup; one model in memory."""
    held: dict[str, Any] = {}

    def leave() -> None:
        if (before := held.pop("alone", None)) is not None:
            before.__exit__(None, None, None)

    def entrant(name: str) -> LLM:
        leave()
        kind = name if name == "soup" else "mixture"
        if held.get("kind") != kind:
            held.clear()
            gc.collect()
            held.update(kind=kind, llm=_soup(mixture) if kind == "soup" else LLM(mixture, quantize="int8"))
        llm: LLM = held["llm"]
        if name not in ("mixture", "soup"):
            held["alone"] = alone(llm, llm.expert_number(name))
            held["alone"].__enter__()
        return llm

    yield entrant
    leave()


def _soup(mixture: str) -> LLM:
    """The experts' average, rounded as the others are."""
    source = open_source(mixture)
    return soup(source, Soup(tuple(range(source.config.num_experts))), compute_dtype(), quantize="int8")


def sampled(spec: str) -> Task:
    """The task of NAME or NAME:LIMIT; of fewer examples evenly from all of them."""
    name, _, limit = spec.partition(":")
    task = find_task(name)
    if not limit:
        return task
    total, wanted = len(task.examples), min(int(limit), len(task.examples))
    return task.model_copy(
        update={"examples": tuple(task.examples[i * total // wanted] for i in range(wanted))}
    )


def measured(llm: LLM, task: Task) -> dict[str, Any]:
    """A task of one entrant: every value, the scores, seconds of processor time."""
    begun = time.process_time()
    found = MEASURES[task.kind](llm, task, Work())
    return {
        "examples": len(task.examples),
        "scores": {m.metric: m.score().to_dict() for m in found},
        "values": {m.metric: list(m.values) for m in found},
        "weights": {m.metric: list(m.weights) for m in found if m.weights is not None},
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def beside(of: dict[str, Any]) -> dict[str, Any]:
    """The mixture less each other, on the same examples, with an interval, for each metric."""
    if "mixture" not in of:
        return {}
    return {
        name: {m: paired(_measured(of["mixture"], m), _measured(other, m)).to_dict() for m in other["values"]}
        for name, other in of.items()
        if name != "mixture"
    }


def _measured(of: dict[str, Any], metric: str) -> Measured:
    return Measured(metric, of["values"][metric], of["weights"].get(metric))


def ask(llm: LLM) -> dict[str, str]:
    """The answers to all questions, side by side."""
    params = SamplingParams(temperature=0, max_tokens=ANSWER, repetition_penalty=CHAT_PENALTY)
    outputs = [llm.chat([{"role": "user", "content": question}], params) for question in QUESTIONS.values()]
    return {kind: output.outputs[0].text for kind, output in zip(QUESTIONS, outputs, strict=True)}


if __name__ == "__main__":
    main()
