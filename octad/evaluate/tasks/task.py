"""Tasks on disk: what is asked, and what counts as right.

    task = read_task("capitals.yaml")            # or HumanEval.jsonl.gz, or any of the kinds below as .jsonl
    task.kind, len(task.examples)

Five kinds, each with its own examples and settings:

    code          {task_id, prompt, test, entry_point}: a function to finish, judged by its tests (HumanEval's format)
    choice        {question, choices, answer}: the likeliest of the choices should be the right one
    generate      {prompt, answer} or {prompt, answers} or {prompt, regex}: a short text to write
    chat          {question, language} and perhaps {answers}: a question through the chat template
    continuation  {text}: a document to go on with

YAML holds the settings and the examples, or the name of a file of them (`examples: questions.jsonl`, relative to it). A
.jsonl file alone is a task with default settings whose kind is read off its first line. Imports no torch.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from octad.checkpoint.config_file import Section, one_line, yaml_reason
from octad.engine.params import CHAT_PENALTY
from octad.errors import DataError
from octad.guard import JSON_BYTES, parse_json, parse_yaml

SUFFIXES = (".yaml", ".yml", ".jsonl", ".jsonl.gz")
STOP_CODE = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al. 2021, section 3.2


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, float)) else value


Strings = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Example(BaseModel):
    """One example; public files have more keys than are needed, so others are let be."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)


class Problem(Example):
    """A function to finish: `prompt` + what the model writes + `test`, then check(entry_point)."""

    task_id: str
    prompt: str = Field(min_length=1)
    test: str = Field(min_length=1)
    entry_point: str = Field(min_length=1)
    canonical_solution: str = ""


class Question(Example):
    """A question with its choices; `answer` is the right one's number from 0, or its text."""

    question: str
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int

    @model_validator(mode="before")
    @classmethod
    def _answer_by_text(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("answer"), str):
            choices = raw.get("choices") or []
            if raw["answer"] not in choices:
                raise ValueError(f"answer {raw['answer']!r} is none of the choices")
            return raw | {"answer": choices.index(raw["answer"])}
        return raw

    @model_validator(mode="after")
    def _answer_exists(self) -> Self:
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer}: there are {len(self.choices)} choices, counted from 0")
        if not all(self.choices):
            raise ValueError("choices: one of them is empty")
        return self


class Prompt(Example):
    """A short text to write: one of `answers`, or what `regex` finds in it."""

    prompt: str = Field(min_length=1)
    answers: Strings = ()
    regex: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_answer(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "answer" in raw and "answers" not in raw:
            return {**raw, "answers": raw["answer"]}
        return raw

    @model_validator(mode="after")
    def _can_be_right(self) -> Self:
        if bool(self.answers) == (self.regex is not None):
            raise ValueError("give answers or a regex, one of them")
        try:
            re.compile(self.regex or "")
        except re.error as error:
            raise ValueError(f"regex {self.regex!r}: {error}") from None
        return self


class ChatQuestion(Example):
    """A question to be answered in its language; `answers`: what a right answer contains, where there is a right one."""

    question: str = Field(min_length=1)
    language: Literal["en", "fr", "de", "es"]
    answers: Strings = ()


class Passage(Example):
    """A document, and what it belongs to (a domain, a book): its distractors come from there."""

    text: str = Field(min_length=1)
    group: str = ""


class Settings(Section):
    """What all tasks have."""

    name: str = Field(min_length=1)


class CodeTask(Settings):
    """samples 1: the likeliest answer; more: drawn at `temperature` and `top_p`, for pass@k."""

    kind: Literal["code"] = "code"
    examples: tuple[Problem, ...] = Field(min_length=1)
    max_tokens: int = Field(default=384, ge=1)
    stop: Strings = STOP_CODE
    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.8, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    seed: int = 0


class ChoiceTask(Settings):
    """`template` makes the context out of {question}; a choice follows it after `separator`."""

    kind: Literal["choice"] = "choice"
    examples: tuple[Question, ...] = Field(min_length=1)
    template: str = "{question}"
    separator: str = " "

    @model_validator(mode="after")
    def _template_has_question(self) -> Self:
        if "{question}" not in self.template:
            raise ValueError("template: has no {question}")
        return self


class GenerateTask(Settings):
    """match exact: the whole answer, normalised; contains: somewhere in it. A regex is searched in the plain answer."""

    kind: Literal["generate"] = "generate"
    examples: tuple[Prompt, ...] = Field(min_length=1)
    max_tokens: int = Field(default=32, ge=1)
    stop: Strings = ("\n",)
    match: Literal["exact", "contains"] = "exact"


class ChatTask(Settings):
    """The likeliest answers, under the penalty that `octad chat` has by default."""

    kind: Literal["chat"] = "chat"
    examples: tuple[ChatQuestion, ...] = Field(min_length=1)
    max_tokens: int = Field(default=64, ge=1)
    repetition_penalty: float = Field(default=CHAT_PENALTY, gt=0)


class ContinuationTask(Settings):
    """Each document is cut after `given` characters (at a blank). The next `length` are its true continuation, to be told
    from those of `distractors` other documents of its group; the next `written` are what samples are held against.
    """

    kind: Literal["continuation"] = "continuation"
    examples: tuple[Passage, ...] = Field(min_length=2)
    given: int = Field(default=400, ge=1)
    length: int = Field(default=200, ge=20)
    written: int = Field(default=400, ge=20)
    distractors: int = Field(default=5, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 0


Task = CodeTask | ChoiceTask | GenerateTask | ChatTask | ContinuationTask
KINDS: dict[str, Any] = {
    "code": CodeTask,
    "choice": ChoiceTask,
    "generate": GenerateTask,
    "continuation": ContinuationTask,
    "chat": ChatTask,
}
SIGNS = {
    "test": "code",
    "choices": "choice",
    "language": "chat",
    "regex": "generate",
    "answer": "generate",
    "answers": "generate",
}


def read_task(path: str | Path, name: str | None = None) -> Task:
    """The task in a file. Raises DataError with file, place and what is wrong there."""
    file = Path(path)
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{file}: is no task; give a file that ends in {', '.join(SUFFIXES)}")
    if file.name.endswith((".yaml", ".yml")):
        return _from_yaml(file, name)
    stem = file.name.removesuffix(".gz").removesuffix(".jsonl")
    return _checked(file, {"name": name or stem, "examples": list(_lines(file))})


def _from_yaml(file: Path, name: str | None) -> Task:
    try:
        raw = parse_yaml(_text(file))
    except yaml.YAMLError as error:
        raise DataError(f"{file}: cannot be read as YAML ({yaml_reason(error)})") from None
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected 'kind', 'examples' and settings, found {type(raw).__name__}")
    settings: dict[str, Any] = {"name": name or file.stem} | raw
    if isinstance(settings.get("examples"), str):
        settings["examples"] = list(_lines(file.parent / settings["examples"]))
    return _checked(file, settings)


def _checked(file: Path, raw: dict[str, Any]) -> Task:
    examples = raw.get("examples")
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{file}: has no examples")
    kind = raw.get("kind") or _kind_of(examples[0])
    if kind not in KINDS:
        found = f"kind {kind!r}" if kind else f"keys {', '.join(map(str, examples[0]))}"
        raise DataError(f"{file}: found {found}; the kinds are {', '.join(KINDS)}")
    try:
        return TypeAdapter(KINDS[kind]).validate_python(raw | {"kind": kind})  # type: ignore[no-any-return]
    except ValidationError as error:
        raise DataError(f"{file}: {_one_line(error, KINDS[kind])}") from None


def _kind_of(example: Any) -> str:
    keys = example if isinstance(example, dict) else {}
    return next(
        (kind for key, kind in SIGNS.items() if key in keys), "continuation" if "text" in keys else ""
    )


def _one_line(error: ValidationError, kind: type[Settings]) -> str:
    """An unknown key, or the first mistake: where, and what. Examples are counted from 1."""
    first = error.errors()[0]
    if any(e["type"] == "extra_forbidden" for e in error.errors()):
        return one_line(error, kind)
    place = list(first["loc"])
    if len(place) > 1 and place[0] == "examples" and isinstance(place[1], int):
        place[:2] = [f"example {place[1] + 1}"]
    where = ".".join(map(str, place))
    return f"{where}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _lines(file: Path) -> Iterator[Any]:
    """The objects of a .jsonl file."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            yield parse_json(line, f"{file} line {number}", DataError, complaint="not JSON", prose=True)


def _text(file: Path) -> str:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            data = stream.read(JSON_BYTES + 1)
        if len(data) > JSON_BYTES:
            raise OSError(f"more than {JSON_BYTES:,} bytes, which no task needs")
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{file}: cannot be read as UTF-8 text ({reason})") from None
