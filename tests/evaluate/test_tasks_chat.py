"""The task of questions: languages told apart on text that people wrote, loops by hand, answers beside transformers'."""

# ruff: noqa: F401, F811 (fixtures are imported)
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tiny_chat import llm, mixture, untaught

from octad.engine.llm import LLM
from octad.errors import DataError, RequestError
from octad.evaluate.tasks.asking import answers_of, in_language, loops, measure_chat, right
from octad.evaluate.tasks.catalogue import HELD_OUT, find_task
from octad.evaluate.tasks.task import ChatQuestion, ChatTask, read_task
from octad.evaluate.tasks.which_language import language_of
from octad.evaluate.tasks.work import Work


@pytest.mark.parametrize(
    ("domain", "language"), [("literature", "en"), ("french", "fr"), ("german", "de"), ("spanish", "es")]
)
def test_languages_of_text_that_people_wrote(domain: str, language: str) -> None:
    """Pieces of 25 words, as long as an answer, of held-out documents."""
    lines = (HELD_OUT / domain / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    words = [word for line in lines for word in json.loads(line)["text"].split()]
    pieces = [" ".join(words[i : i + 25]) for i in range(0, len(words) - 24, 25)]
    found = Counter(language_of(piece) for piece in pieces)
    assert len(pieces) > 50
    assert found[language] >= 0.97 * len(pieces), found


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The capital of France is Paris.", "en"),
        ("Die Hauptstadt von Frankreich ist Paris.", "de"),
        ("La capitale de la France est Paris.", "fr"),
        ("La capital de Francia es París.", "es"),
        ("Paris.", None),
        ("42", None),
        ("", None),
        ("for (i = 0; i < n; i++) { x += y[i]; }", None),
    ],
)
def test_languages_of_answers(text: str, language: str | None) -> None:
    assert language_of(text) == language


def test_what_counts() -> None:
    asked = ChatQuestion(question="What is the capital of France?", language="en", answers=("Paris",))
    assert in_language("Paris.", asked)
    assert in_language("It is Paris.", asked)
    assert not in_language("La capitale de la France est Paris.", asked)
    assert not in_language(" \n", asked)
    assert right("I think that it is PARIS!", asked)
    assert not right("Parisian cafés", asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no no no no", False),
        ("no no no no no", True),
        ("I see the sea. " * 2, False),
        ("It began well. " + "I see the sea. " * 3 + "And so it ended.", True),
        (" ".join(map(str, range(20))) + " ", False),
        ((" ".join(map(str, range(20))) + " ") * 3, True),
        ("", False),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) is expected


def test_answers_are_those_of_transformers(llm: LLM, mixture: Path) -> None:
    """Greedy, under the same penalty, after what the template makes of the question, written by hand."""
    questions = ("Hi", "Who is there?")
    examples = tuple(ChatQuestion(question=q, language="en", answers=("zzz",)) for q in questions)
    task = ChatTask(name="t", examples=examples, max_tokens=8, repetition_penalty=1.3)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    expected = []
    for question in questions:
        ids = torch.tensor([llm.tokenizer.encode(f"<user>{question}\n<assistant>", parse_special=False)])
        out = theirs.generate(ids, max_new_tokens=8, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
        expected.append(llm.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    assert answers_of(llm, task, Work()) == expected
    measures = {m.metric: m.values for m in measure_chat(llm, task)}
    assert measures["right"] == [0, 0]
    assert len(measures["language"]) == len(measures["no loop"]) == 2


def test_a_model_that_holds_no_conversations(untaught: Path) -> None:
    task = ChatTask(name="t", examples=(ChatQuestion(question="Hi", language="en"),))
    with pytest.raises(RequestError, match="t: the model has no chat template"):
        measure_chat(LLM(untaught, device="cpu"), task)


def test_octads_own_questions() -> None:
    task = find_task("octad-chat")
    assert isinstance(task, ChatTask)
    assert Counter(e.language for e in task.examples) == {"en": 52, "fr": 52, "de": 52, "es": 52}
    assert len({e.question for e in task.examples}) == len(task.examples) == 208
    assert sum(bool(e.answers) for e in task.examples) == 104
    wrong = [e.question for e in task.examples if language_of(e.question) not in (None, e.language)]
    assert not wrong


def test_files_of_questions(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"question": "Wer?", "language": "de", "answers": "ich"}) + "\n")
    bad.write_text(json.dumps({"question": "Chi?", "language": "it"}) + "\n")
    task = read_task(good)
    assert isinstance(task, ChatTask)
    assert task.examples[0].answers == ("ich",)
    with pytest.raises(DataError, match="example 1"):
        read_task(bad)
