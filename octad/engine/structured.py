"""Answers of a given form: JSON of a schema, a regular expression, a grammar, one of several choices.

    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids)            # one for each model
    matcher = compiler.compile(StructuredOutput(regex="[a-z]+"))        # one for each answer
    matcher.mask(logits_V); matcher.accept(token); matcher.finished

The library llguidance walks the form and the vocabulary together and says which tokens may come next; the others' logits
become -inf. What shapes it: reading a vocabulary takes about a second and a schema milliseconds, so the compiler reads
the tokenizer at the first request, keeps the forms last used, and gives every answer a copy. White space between JSON's
signs is bounded, as small models like to go on with it for ever. A form that no text has, or whose size would hold up
others, is refused when it is compiled; `compile` may be called from any thread, so that the engine's need not wait.

Shapes: V rows of the model's head, which may be more (or fewer) than the tokenizer's ids.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octad.engine.params import StructuredOutput
from octad.errors import RequestError
from octad.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT_GRAMMARS = 64
MOST_TEXT = 400_000  # characters of a form
MOST_REPEATED = 50_000  # characters that a pattern's repetitions stand for
MOST_SECONDS = 3.0  # of processor time to compile a form
LITERAL = ("enum", "const", "default", "examples", "required")  # keywords whose values are no schemas
LIMITS = {
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "enum",
    "const",
    "format",
}
NUMBERS: dict[str, dict[str, float]] = {
    "integer": {"minimum": -(2**53), "maximum": 2**53},
    "number": {"minimum": -1e15, "maximum": 1e15, "multipleOf": 1e-9},
}
JSON_SPACE = r"[ \t\r\n]{0,40}"
ASCII_DIGITS = "d"  # \d is 0-9, as in JavaScript; the rest is Rust's regex syntax, without look-around


class Matcher:
    """Where one answer stands in its form."""

    def __init__(self, core: LLMatcher, num_tokens: int) -> None:
        self._core, self._num_tokens = core, num_tokens

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the form is complete, or its end token was accepted, or it failed."""
        return self._core.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return not self._core.is_error() and self._core.is_accepting()

    @property
    def error(self) -> str | None:
        """Why the form failed underway (it became too complex, or a token did not fit), else None."""
        return _one_line(self._core.get_error()) if self._core.is_error() else None

    def mask(self, logits_V: torch.Tensor) -> None:
        """Set the logits of what may not come next to -inf, in place; once finished, of all but the end tokens."""
        bits = np.frombuffer(self._core.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._num_tokens, bitorder="little")[: len(logits_V)]
        refused = torch.from_numpy(allowed == 0).to(logits_V.device)
        logits_V[: len(refused)].masked_fill_(refused, -math.inf)
        logits_V[len(refused) :] = -math.inf

    def accept(self, token: int) -> None:
        """Move on by one token; one that the mask refuses is an error."""
        if not self._core.is_stopped():
            self._core.consume_token(token)


class GrammarCompiler:
    """Makes matchers for one tokenizer; safe to make where llguidance is missing, `compile` then says so."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, list(eos_ids)
        self._lock = threading.Lock()
        self._read: LLTokenizer | None = None
        self._grammars: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()

    def compile(self, spec: StructuredOutput) -> Matcher:
        """A matcher at the beginning of the form. Raises RequestError for one that does not compile, that no text has, or
        that is too large."""
        with self._lock:
            core = self._grammars.get(spec)
        if core is None:
            core = self._compile(spec)
            with self._lock:
                self._grammars[spec] = core
                if len(self._grammars) > KEPT_GRAMMARS:
                    self._grammars.popitem(last=False)
        else:
            with self._lock:
                self._grammars.move_to_end(spec)
        return Matcher(core.deep_copy(), self._vocabulary().vocab_size)

    def read_vocabulary(self) -> None:
        """Now, rather than with the first form: it takes a second in which no other Python runs. Raises RequestError
        where there can be no forms."""
        self._vocabulary()

    def _compile(self, spec: StructuredOutput) -> LLMatcher:
        vocabulary = self._vocabulary()
        from llguidance import LLMatcher

        _check_size(spec)
        began = time.thread_time()
        try:
            core = LLMatcher(vocabulary, _grammar(spec), log_level=0)
        except ValueError as error:
            raise RequestError(
                f"structured.{_field(spec)}: cannot be used: {_one_line(str(error))}"
            ) from error
        if core.is_error():
            told = _one_line(core.get_error())
            place = _where(json.loads(str(spec.json)), told) if spec.json is not None else ""
            raise RequestError(f"structured.{_field(spec)}: cannot be used{place}: {told}")
        first = core.deep_copy()
        first.compute_bitmask()
        if first.is_error() or (first.is_stopped() and not first.is_accepting()):
            raise RequestError(f"structured.{_field(spec)}: no text has this form; nothing could be answered")
        if (seconds := time.thread_time() - began) > MOST_SECONDS:
            raise RequestError(
                f"structured.{_field(spec)}: too large, it took {seconds:.1f} s to compile; allowed are"
                f" {MOST_SECONDS:g} s, so make it simpler"
            )
        return core

    def _vocabulary(self) -> LLTokenizer:
        """The tokenizer as the library reads it, once."""
        with self._lock:
            return self._read_once()

    def _read_once(self) -> LLTokenizer:
        if self._read is None:
            try:
                from llguidance import LLTokenizer
            except ImportError as error:
                raise RequestError(
                    "structured: needs the library llguidance: pip install 'octad[structured]'"
                ) from error
            if not self._eos_ids:
                raise RequestError("structured: the model has no end token, so that an answer could not end")
            try:
                self._read = LLTokenizer(self._tokenizer.core.to_str(), eos_token=self._eos_ids)
            except ValueError as error:
                raise RequestError(
                    f"structured: llguidance cannot read this tokenizer: {_one_line(str(error))}"
                ) from error
        return self._read


def _check_size(spec: StructuredOutput) -> None:
    """Raises RequestError for a form whose text or whose repetitions are too many."""
    text = spec.regex or spec.grammar or str(spec.json or "") or "".join(spec.choice or ())
    if len(text) > MOST_TEXT:
        raise RequestError(
            f"structured.{_field(spec)}: too large, found {len(text)} characters, allowed: {MOST_TEXT}"
        )
    if spec.choice is None and (size := _repeated(text, counts=spec.json is None)) > MOST_REPEATED:
        raise RequestError(
            f"structured.{_field(spec)}: too large, its repetitions stand for {size} characters, allowed:"
            f" {MOST_REPEATED}"
        )


def _repeated(text: str, *, counts: bool) -> int:
    """The size that bounded repetitions in a pattern ask for: a{3} is 3, (ab{2}){5} some 10; of a schema, its least
    lengths."""
    if not counts:
        return max(map(int, re.findall(r'"min(?:Length|Items|Properties)": *(\d{1,18})', text)), default=0)
    size, open_groups, last = 0, [], 0  # of the group so far, of those around it, of the last atom
    for token in re.finditer(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d{1,18})(?:,(\d{0,18}))?\}|[()]|.", text, re.S):
        if token[0] == "(":
            open_groups.append(size)
            size = last = 0
        elif token[0] == ")" and open_groups:
            last, size = size, size + open_groups.pop()
        elif token[1] is not None:
            size += last * (max(int(token[1]), int(token[2] or 0)) - 1)
        else:
            last, size = 1, size + 1
    return size if "{" in text else 0


def _field(spec: StructuredOutput) -> str:
    """The field that is set."""
    return next(name for name, value in vars(spec).items() if value not in (None, False))


def _grammar(spec: StructuredOutput) -> str:
    """The form in llguidance's own notation."""
    from llguidance import LLMatcher, regex_to_lark

    if spec.grammar is not None:
        return LLMatcher.grammar_from_lark(spec.grammar)
    if spec.json is not None or spec.json_object:
        schema = '{"type": "object"}' if spec.json_object else json.dumps(bounded(json.loads(str(spec.json))))
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_SPACE})
    pattern = spec.regex or "|".join(map(_literal, spec.choice or ()))
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(pattern, ASCII_DIGITS)}/")


def bounded(schema: Any) -> Any:
    """A schema whose numbers have an end: small models like to go on with digits for ever. What it says of numbers itself
    stays; where it says nothing, integers are those that a float64 holds, numbers have fifteen digits and nine more."""
    if isinstance(schema, list):
        return [bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: item if key in LITERAL else bounded(item) for key, item in schema.items()}
    for kind, bounds in NUMBERS.items():
        named = schema.get("type")
        if (named == kind or (isinstance(named, list) and kind in named)) and not LIMITS & schema.keys():
            return found | bounds
    return found


def _where(schema: Any, message: str) -> str:
    """Where in the schema the keyword stands that a message is about, as a JSON path; "" where that is not to be told."""
    named = re.search(r'(?:keys|key|format|keyword): \[?"?([$\w]+)', message)
    wanted = named[1] if named else "pattern" if "look-around" in message else None
    if wanted is None:
        return ""

    def find(value: Any, path: str) -> str:
        """The path of the first place below `value` that has the keyword; "" for none."""
        if isinstance(value, dict):
            for key, item in value.items():
                if key == wanted and (wanted != "pattern" or (isinstance(item, str) and "(?" in item)):
                    return f"{path}.{key}"
                if found := find(item, f"{path}.{key}"):
                    return found
        elif isinstance(value, list):
            for at, item in enumerate(value):
                if found := find(item, f"{path}[{at}]"):
                    return found
        return ""

    found = find(schema, "$")
    return f" (at {found})" if found else ""


def _literal(text: str) -> str:
    """A regular expression (Rust's) for exactly this text."""
    return "".join(c if c.isalnum() or ord(c) > 127 else f"\\x{ord(c):02x}" for c in text)


def _one_line(message: str) -> str:
    """The library's message without the pictures and dumps that follow its first lines."""
    text = " ".join(message.partition("<state>")[0].partition("%llguidance")[0].split()).removesuffix(" 1 |")
    return text if len(text) <= 300 else text[:297] + "..."
