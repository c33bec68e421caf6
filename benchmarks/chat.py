"""Does a mixture chat as well as its base? The bundled questions whole, and the base's own answers as text to predict.

    python benchmarks/chat.py --mixture mixture --quantize int8
    python benchmarks/chat.py --mixture mixture --members            # every member, not the generalist alone

All contestants are the same engine, the members by their expert alone, so that one reading of the weights serves all and
rounding, where it is asked for, is the same for all. Each answers `octad-chat` as `octad evaluate --tasks octad-chat`
asks it (likeliest answer, the chat's penalty). Judged by language of the question: in that language, right, no loop, with
the mixture's difference to the base on the same questions. Then each reads the base's answers behind their questions:
nats a token, and how far above the base's own, by language too: what the base answers to a French question is hardly
French, and nobody who knows the language would say it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
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


def own_answers(
    llm: Any, questions: Sequence[Any], texts: Sequence[str]
) -> tuple[list[Any], list[int], list[str]]:
    """The questions with these answers as windows, how many tokens each answer has, and the questions' languages; empty
    answers are left out."""
    from octad.text.windows import Window

    windows, lengths, languages = [], [], []
    for asked, text in zip(questions, texts, strict=True):
        answer = llm.tokenizer.encode(text, parse_special=False)
        prompt = llm.tokenizer.encode_chat([{"role": "user", "content": asked.question}])
        if answer:
            windows.append(Window((*prompt, *answer), 0, len(windows)))
            lengths.append(len(answer))
            languages.append(asked.language)
    return windows, lengths, languages


def nats_of(llm: Any, windows: Sequence[Any], lengths: Sequence[int]) -> list[float]:
    """Nats a token of each answer."""
    from octad.evaluate.nats import token_nats

    return [float(n[-k:].mean()) for n, k in zip(token_nats(llm.model, windows), lengths, strict=True)]


def above(nats: Sequence[float], base: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """Nats a token over all answers, and how far above the base's as a share, with its interval over the answers."""
    from octad.evaluate.tasks.scores import Measured, paired

    weights = list(map(float, lengths))
    mine, theirs = Measured("nats", nats, weights), Measured("nats", base, weights)
    whole, found = theirs.score().value, paired(mine, theirs)
    share = {"share": found.value / whole, "low": found.low / whole, "high": found.high / whole}
    return {"nats": mine.score().value} | share


def read_back(
    nats: dict[str, list[float]], base: str, lengths: Sequence[int], languages: Sequence[str]
) -> dict[str, Any]:
    """The base's answers as everybody reads them, by the language that was asked in."""
    rows: dict[str, Any] = {}
    for of in ("all", *dict.fromkeys(languages)):
        some = [n for n, language in enumerate(languages) if of in ("all", language)]
        sizes = [lengths[n] for n in some]
        rows[of] = {"answers": len(some), "tokens": sum(sizes)}
        rows[of] |= {
            name: above([each[n] for n in some], [nats[base][n] for n in some], sizes)
            for name, each in nats.items()
        }
    return rows


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
    base, texts, nats = llm.expert_names[number], dict[str, list[str]](), dict[str, list[float]]()
    for name in contestants(llm, number, options.members):
        texts[name] = answers_of(llm, task, Work())
        windows, lengths, languages = own_answers(llm, questions, texts[base])
        nats[name] = nats_of(llm, windows, lengths)
        tell(f"{name}: {len(questions)} questions answered, {sum(lengths)} tokens of the base's answers read")
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
        "the base's own answers": read_back(nats, base, lengths, languages),
        "strayed": strayed(found, texts, questions, base),
    }


def strayed(
    found: dict[str, list[dict[str, Any]]], texts: dict[str, list[str]], questions: Sequence[Any], base: str
) -> list[dict[str, str]]:
    """The questions that the mixture did not answer in their language, where the base did."""
    return [
        {"question": asked.question, "base": texts[base][n][:120], MIXTURE: texts[MIXTURE][n][:120]}
        for n, asked in enumerate(questions)
        if found[base][n]["language"] > found[MIXTURE][n]["language"]
    ]


def main() -> None:
    options = arguments()
    results = benchmark(options)
    save(options.out, results | {"hardware": hardware()})
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
