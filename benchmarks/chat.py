"""Does a mixture chat as well as its base? The bundled questions whole, and the base's own answers as text to predict.

    python benchmarks/chat.py --mixture mixture --quantize int8
    python benchmarks/chat.py --mixture mixture --members            # every member, not the generalist alone

All contestants are the same engine, the members by their expert alone, so that one reading of the weights serves all and
rounding, where it is asked for, is the same for all. Each answers `octad-chat` as `octad evaluate --tasks octad-chat`
asks it (likeliest answer, the chat's penalty). Judged by language of the question: in that language, right, no loop, with
the mixture's difference to the base on the same questions. Then each reads the base's answers behind their questions:
nats a token, and how far above the base's own, by language too: what the base answers to a French question is hardly
French, and nobody who knows the language would say it. So the answers that are in the language of their question come
once more by themselves, and the answers that cost the mixture most are named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import command_line, hardware, save, tell

ROOT = Path(__file__).resolve().parent.parent
MIXTURE = "mixture"
MEASURES = ("language", "right", "no loop")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mixture", type=Path, required=True)
    parser.add_argument("--task", default="octad-chat")
    parser.add_argument("--quantize", choices=("int8", "int4"), default=None)
    parser.add_argument("--members", action="store_true", help="all of them, not the generalist alone")
    parser.add_argument(
        "--languages", nargs="*", default=["en", "fr", "de", "es"], help="of the questions asked"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "chat.json")
    return parser.parse_args()


def contestants(llm: Any, base: int, everyone: bool) -> Iterator[str]:
    """Names; while one is out, the model is that contestant. The base comes first."""
    from octad.evaluate.tasks.entrants import alone

    with alone(llm, base):
        yield llm.expert_names[base]
    llm.loop.call(llm.engine.reset_prefix_cache)
    yield MIXTURE
    for number, name in enumerate(llm.expert_names):
        if everyone and number != base:
            with alone(llm, number):
                yield name


def base_of(mixture: Path) -> int:
    """The expert that is the base itself."""
    from octad.checkpoint.load import open_source
    from octad.checkpoint.provenance import Provenance

    made = Provenance.of(open_source(mixture, quantised=True))
    assert made is not None, "not an octad mixture"
    return next(number for number, expert in enumerate(made.experts) if expert["kind"] == "base")


def judged(text: str, asked: Any) -> dict[str, Any]:
    """One answer."""
    from octad.evaluate.tasks.asking import in_language, loops, right

    found = {"language": int(in_language(text, asked)), "no loop": int(not loops(text))}
    return found | ({"right": int(right(text, asked))} if asked.answers else {})


def values(answers: Sequence[dict[str, Any]], questions: Sequence[Any], of: str, measure: str) -> Any:
    """A measure of the questions of one language ("all") that have it."""
    from octad.evaluate.tasks.scores import Measured

    pairs = zip(answers, questions, strict=True)
    return Measured(measure, [a[measure] for a, q in pairs if of in ("all", q.language) and measure in a])


def table(found: dict[str, list[dict[str, Any]]], questions: Sequence[Any], base: str) -> dict[str, Any]:
    """Every measure by language: each contestant, and the mixture less the base."""
    from octad.evaluate.tasks.scores import paired

    rows: dict[str, Any] = {}
    for of in ("all", *dict.fromkeys(q.language for q in questions)):
        for measure in MEASURES:
            each = {name: values(answers, questions, of, measure) for name, answers in found.items()}
            if not each[base].values:
                continue
            row: dict[str, Any] = {"questions": len(each[base].values)}
            row |= {name: measured.score().to_dict() for name, measured in each.items()}
            row["mixture less base"] = paired(each[MIXTURE], each[base]).to_dict()
            rows.setdefault(of, {})[measure] = row
    return rows


@dataclass(frozen=True)
class Answer:
    """What the base said to a question: as a window behind it, of which the last `tokens` are the answer."""

    asked: Any
    text: str
    window: Any
    tokens: int


def own_answers(llm: Any, questions: Sequence[Any], texts: Sequence[str]) -> list[Answer]:
    """The questions with these answers; empty ones are left out."""
    from octad.text.windows import Window

    found = list[Answer]()
    for asked, text in zip(questions, texts, strict=True):
        answer = llm.tokenizer.encode(text, parse_special=False)
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": asked.question}])
        if answer:
            window = Window((*prompt, *answer), 0, len(found))
            found.append(Answer(asked, text, window, len(answer)))
    return found


def nats_of(llm: Any, answers: Sequence[Answer]) -> list[float]:
    """Nats a token of each answer."""
    from octad.evaluate.nats import token_nats

    read = token_nats(llm.model, [answer.window for answer in answers])
    return [float(nats[-answer.tokens :].mean()) for nats, answer in zip(read, answers, strict=True)]


def above(nats: Sequence[float], base: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """Nats a token over all answers, and how far above the base's as a share, with its interval over the answers."""
    from octad.evaluate.tasks.scores import Measured, paired

    weights = list(map(float, lengths))
    mine, theirs = Measured("nats", nats, weights), Measured("nats", base, weights)
    whole, found = theirs.score().value, paired(mine, theirs)
    share = {"share": found.value / whole, "low": found.low / whole, "high": found.high / whole}
    return {"nats": mine.score().value} | share


def read_back(nats: dict[str, list[float]], base: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """The base's answers as everybody reads them, by the language that was asked in, and of each language those that are
    in it by themselves."""
    from octad.evaluate.tasks.asking import in_language

    kept = [in_language(answer.text, answer.asked) for answer in answers]
    rows: dict[str, Any] = {}
    for of in ("all", *dict.fromkeys(answer.asked.language for answer in answers)):
        asked = [n for n, answer in enumerate(answers) if of in ("all", answer.asked.language)]
        rows[of] = group(nats, base, answers, asked)
        rows[f"{of}, in that language"] = group(nats, base, answers, [n for n in asked if kept[n]])
    return rows


def group(
    nats: dict[str, list[float]], base: str, answers: Sequence[Answer], some: Sequence[int]
) -> dict[str, Any]:
    """Some of the answers: everybody's nats on them, and which of them cost the mixture most, in nats."""
    sizes = [answers[n].tokens for n in some]
    lost = {n: (nats[MIXTURE][n] - nats[base][n]) * answers[n].tokens for n in some}
    row: dict[str, Any] = {"answers": len(some), "tokens": sum(sizes), "lost": sum(lost.values())}
    row["most lost"] = [
        {"question": answers[n].asked.question, "base": answers[n].text[:120], "nats": lost[n]}
        for n in sorted(some, key=lambda n: -lost[n])[:5]
    ]
    everyone = {
        name: above([each[n] for n in some], [nats[base][n] for n in some], sizes)
        for name, each in nats.items()
        if some
    }
    return row | everyone


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Everyone answers; then everyone reads the base's answers."""
    from octad.engine.llm import LLM
    from octad.evaluate.tasks.asking import answers_of
    from octad.evaluate.tasks.catalogue import find_task
    from octad.evaluate.tasks.work import Work

    task = find_task(options.task)
    asked = tuple(question for question in task.examples if question.language in options.languages)
    task = task.model_copy(update={"examples": asked})
    questions = task.examples
    llm = LLM(options.mixture, quantize=options.quantize)
    number = base_of(options.mixture)
    base, answers = llm.expert_names[number], list[Answer]()
    texts, nats = dict[str, list[str]](), dict[str, list[float]]()
    for name in contestants(llm, number, options.members):
        texts[name] = answers_of(llm, task, Work())
        answers = own_answers(llm, questions, texts[base])
        nats[name] = nats_of(llm, answers)
        tell(f"{name}: {len(questions)} questions answered, {len(answers)} of the base's answers read")
    found = {
        name: [judged(text, asked) for text, asked in zip(answers, questions, strict=True)]
        for name, answers in texts.items()
    }
    return {
        "benchmark": "chat",
        "command": command_line(),
        "base": base,
        "max_tokens": task.max_tokens,
        "repetition_penalty": task.repetition_penalty,
        "languages": table(found, questions, base),
        "the base's own answers": read_back(nats, base, answers),
        "strayed": lost_to_base(found, texts, questions, base, "language"),
        "wrong where the base is right": lost_to_base(found, texts, questions, base, "right"),
        "right where the base is wrong": lost_to_base(found, texts, questions, base, "right", won=True),
    }


def lost_to_base(
    found: dict[str, list[dict[str, Any]]],
    texts: dict[str, list[str]],
    questions: Sequence[Any],
    base: str,
    measure: str,
    won: bool = False,
) -> list[dict[str, str]]:
    """The questions where the base does what is measured and the mixture does not; the other way round for `won`."""
    better, worse = (MIXTURE, base) if won else (base, MIXTURE)
    return [
        {"question": asked.question, "base": texts[base][n][:120], MIXTURE: texts[MIXTURE][n][:120]}
        for n, asked in enumerate(questions)
        if found[better][n].get(measure, 0) > found[worse][n].get(measure, 0)
    ]


def main() -> None:
    options = arguments()
    results = benchmark(options)
    save(options.out, results | {"hardware": hardware()})
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
