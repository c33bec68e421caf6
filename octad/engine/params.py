"""SamplingParams: what a request asks of the sampler, checked when it is made.

    SamplingParams(temperature=0.7, top_p=0.9, seed=1, stop="\\n\\n")
    SamplingParams(temperature=0, structured=StructuredOutput(json={"type": "object"}))

The names are vLLM's. A value that cannot be served raises RequestError with the field, what was found and what
is allowed, here and not in the middle of a batch. Lists are frozen to tuples and a JSON schema to its text, so
that a params object never changes under a running request. Numbers are judged as float32, which is what the sampler
computes in: a top_p that is nothing there is a top_p of nothing. Bounds are annotations, of which pydantic makes the
JSON Schema (`octad schema sampling`); neither it nor torch is imported here.
"""

from __future__ import annotations

import json
import math
import numbers
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache, partial
from hashlib import blake2b
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, MinLen

from octad.errors import RequestError

# what a generation_config.json may say
OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CHAT_PENALTY = 1.1  # repetition_penalty of a conversation where nobody asks for another: small models go round in circles
CHAT = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": CHAT_PENALTY}  # of a terminal's conversation
GREEDY_BELOW = 1e-5  # a temperature this low is the argmax, and dividing by it would overflow
Counted = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Penalty = Annotated[float, Ge(-2), Le(2)]


@dataclass(frozen=True)
class StructuredOutput:
    """The form that an answer must have; exactly one field is set.

    `json` is a JSON schema (mapping or text), `json_object` any JSON object, `regex` a regular expression that the
    whole answer matches, `grammar` a context-free grammar in Lark's syntax, `choice` the allowed answers.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            _refuse("structured", " and ".join(given) or "nothing", f"exactly one of {names}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _strings("structured.choice", self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                _refuse(f"structured.{name}", value, "a text that is not empty")
        if not isinstance(self.json_object, bool):
            _refuse("structured.json_object", self.json_object, "true or false")
        if self.choice == ():
            _refuse("structured.choice", self.choice, "at least one answer")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is answered. `top_k=0` keeps every token, `max_tokens=None` runs to the end of the context,
    `logprobs=k` reports each token's log-probability and the k likeliest, `prompt_logprobs=k` the prompt's tokens'; the
    rest is as in vLLM. `routed_experts` asks for the routing of every token from `routed_experts_prompt_start` on: what
    lies before may come from the prefix cache. `only_experts`: numbers of the experts that may work on this request.
    """

    n: Annotated[int, Ge(1), Le(1024)] = 1
    max_tokens: Annotated[int, Ge(1)] | None = 256
    min_tokens: Counted = 0
    temperature: Annotated[float, Ge(0)] = 1.0
    top_p: Share = 1.0
    top_k: Annotated[int, Ge(-1)] = 0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Annotated[int, Ge(-(2**63)), Le(2**63 - 1)] | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[Counted] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: Counted | None = None
    prompt_logprobs: Counted | None = None
    logit_bias: Mapping[Counted, Annotated[float, Ge(-100), Le(100)]] = field(
        default_factory=dict, hash=False
    )
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    routed_experts: bool = False
    routed_experts_prompt_start: Counted = 0
    only_experts: Annotated[Sequence[Counted], MinLen(1)] | None = None

    def __post_init__(self) -> None:
        for name, judge in _judges().items():
            self._set(name, judge(getattr(self, name)))
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            _refuse("structured", self.structured, "a StructuredOutput")
        self._set("top_k", max(self.top_k, 0))
        self._set("stop", _strings("stop", self.stop))
        self._set("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        if self.only_experts is not None:
            self._set("only_experts", tuple(sorted(set(_ids("only_experts", self.only_experts)))))
            if not self.only_experts:
                _refuse("only_experts", [], "at least one expert")
        self._refuse_combinations()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken (temperature 0, or a top_p that leaves nothing else)."""
        return self.temperature < GREEDY_BELOW or _single(self.top_p) == 0.0

    @property
    def penalised(self) -> bool:
        """Whether tokens that were seen before are made less (or more) likely."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises RequestError where logit_bias or stop_token_ids name an id that the model does not have."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name):
                if token >= vocab_size:
                    _refuse(name, token, f"token ids from 0 to {vocab_size - 1}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse_combinations(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")
        if self.structured is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            _refuse(name, getattr(self, name), "its default with structured, whose form says where to end")


@cache
def _judges() -> dict[str, Callable[[Any], Any]]:
    """What brings each number and flag to its type, or refuses it, made of the annotations."""
    found: dict[str, Callable[[Any], Any]] = {}
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items():
        optional = type(None) in get_args(hint)
        kind, *bounds = get_args(get_args(hint)[0] if optional else hint) or (hint,)
        low: Any = next(
            (b.ge if isinstance(b, Ge) else b.gt for b in bounds if isinstance(b, (Ge, Gt))), None
        )
        high: Any = next((b.le for b in bounds if isinstance(b, Le)), None)
        if kind is int:
            found[name] = partial(_integer, name, low=low, high=high, optional=optional)
        elif kind is float:
            closed = not any(isinstance(b, Gt) for b in bounds)
            found[name] = partial(
                _real, name, low=low, high=math.inf if high is None else high, closed=closed
            )
        elif kind is bool:
            found[name] = partial(_flag, name)
    return found


def _refuse(name: str, found: object, allowed: str) -> NoReturn:
    text = found if isinstance(found, str) and name == "structured" else repr(found)
    raise RequestError(f"{name}: found {str(text)[:200]}, allowed: {allowed}")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return value


def _integer(name: str, value: Any, low: int, high: int | None, optional: bool) -> int | None:
    if value is None and optional:
        return None
    whole = not isinstance(value, bool) and isinstance(value, numbers.Integral)
    if not whole or value < low or (high is not None and value > high):
        words = f"an integer from {low}" + ("" if high is None else f" to {high}")
        _refuse(name, value, words + (", or None" if optional else ""))
    return int(value)


def _real(name: str, value: Any, low: float, high: float, closed: bool) -> float:
    number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    found = _single(value) if number else math.nan
    if not math.isfinite(found) or not low <= value <= high or (found == low and not closed):
        words = f"a number {'from' if closed else 'above'} {low:g}"
        _refuse(name, value, words + ("" if math.isinf(high) else f" to {high:g}"))
    return float(value)


def _single(value: Any) -> float:
    """A number as float32 has it; inf for one that it cannot hold."""
    try:
        found: float = struct.unpack("f", struct.pack("f", value))[0]
    except (OverflowError, struct.error):
        return math.inf
    return found


def own_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """How a generation_config.json says to sample, as fields of SamplingParams: for conversations in which nobody says
    it, as in vLLM. Nothing where it says not to sample; values that SamplingParams refuses are left out."""
    if generation.get("do_sample") is False:
        return {}
    found: dict[str, Any] = {}
    for name in OWN:
        if generation.get(name) is not None:
            with suppress(RequestError):
                found[name] = _judges()[name](generation[name])
    return found


def mix_seed(seed: int, *places: int) -> int:
    """A seed of its own for each place (an answer's index, a turn): unlike sums, no two pairs share their draws."""
    digest = blake2b(repr((seed, *places)).encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One text is taken for a list of one."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(s, str) and s for s in items):
        _refuse(name, value, "a list of texts, none of them empty")
    return tuple(items)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        _refuse(name, value, "a list of token ids")
    return tuple(int(_integer(name, token, 0, None, False) or 0) for token in value)


def _biases(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        _refuse("logit_bias", value, "a mapping from token ids to numbers from -100 to 100")
    tokens = _ids("logit_bias", list(value))
    return dict(
        zip(tokens, (_real("logit_bias", b, -100.0, 100.0, True) for b in value.values()), strict=True)
    )


def _schema_text(value: object) -> str:
    """A schema as JSON text, with the order of its properties: the answer's keys come in that order."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"structured.json: is no JSON schema: {error}") from error
    if not isinstance(schema, Mapping):
        _refuse("structured.json", schema, "a JSON schema, which is an object")
    return text
