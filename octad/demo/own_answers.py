"""What a base says in conversation before specialists branch off it.

    file = answered("Qwen/Qwen2.5-Coder-0.5B-Instruct", Path("demo-base"))      # demo-base/answers.jsonl

Specialists read its answers besides their own text, so that they unlearn less of what it could do; the routers learn from
them what conversations, programs among them, are the generalist's.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path

from octad.api.interviewing import answers
from octad.combine.conversations import bundled_questions
from octad.engine.llm import LLM
from octad.report import terminal
from octad.staging import replace_file

ANSWERS = "answers.jsonl"
LONGEST = 96  # tokens of an answer
ENDS = (".", "!", "?", "```")


def answered(base: str, place: Path, *, quantize: str | None = None) -> Path | None:
    """The base's answers to the questions that come with octad, as conversations in a file below `place`, which stays
    where it is there already; None where it says nothing. Raises OctadError."""
    file = place / ANSWERS
    if file.is_file():
        return file if file.stat().st_size else None
    questions = bundled_questions()
    llm = LLM(base, quantize=quantize)
    with terminal.progress_bar() as progress:
        found = answers(llm, questions, lambda done: progress("the base answers", done), longest=LONGEST)
    whole = [text if len(llm.tokenizer.encode(text)) < LONGEST - 1 else up_to_an_end(text) for text in found]
    del llm
    gc.collect()
    said = whole if any(whole) else found
    replace_file(
        file, "".join(_row(q, text) for q, text in zip(questions, said, strict=True) if text.strip())
    )
    return file if any(text.strip() for text in said) else None


def up_to_an_end(text: str) -> str:
    """An answer that was cut short, up to the last line that ends like one and outside a block of code; "" where there is
    none: whoever learns from it would learn to stop in the middle."""
    lines = text.split("\n")
    for last in range(len(lines) - 1, 0, -1):
        kept = "\n".join(lines[:last]).rstrip()
        if kept.endswith(ENDS) and kept.count("```") % 2 == 0:
            return kept
    return ""


def _row(question: str, answer: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
