"""From the fields of a request to SamplingParams: one place for every endpoint.

    params = sampling(asked, llm, max_tokens=asked.max_tokens, logprobs=...)

Values are judged by SamplingParams itself; a null takes its default. What a client may name in more than one way
(OpenAI's response_format, vLLM's structured_outputs and guided_*) ends up in one form; two forms at once are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any

from octad.engine.params import SamplingParams, StructuredOutput
from octad.errors import RequestError
from octad.serve.protocol import ChatRequest, SamplingFields, TokenizeRequest
from octad.serve.replies import ApiError

if TYPE_CHECKING:
    from octad.engine.llm import LLM

SAME = (  # fields that SamplingParams has under the same name
    "n",
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "routed_experts_prompt_start",
)
MOST_LOGPROBS, MOST_IDS, MOST_STOPS = 20, 4096, 64
RESERVED = (
    "self",
    "messages",
    "tools",
    "calls_as_json",
)  # variables of templates that have fields of their own


def sampling(
    asked: SamplingFields,
    llm: LLM,
    max_tokens: int | None,
    logprobs: int | None,
    called: Mapping[str, str] | None = None,
    chat: bool = True,
    **more: Any,
) -> SamplingParams:
    """The params of a request; `more` are fields of SamplingParams that the endpoint has made, `called` what it calls
    some of them. In a `chat` what is not given is as the checkpoint's generation_config.json has it. Raises RequestError
    or ApiError for values that cannot be."""
    called = called or {}
    found = dict(llm.own_sampling) if chat else {}
    found |= {name: value for name in SAME if (value := getattr(asked, name)) is not None}
    for name in ("logit_bias", "stop_token_ids", "only_experts"):
        _check_count(name, getattr(asked, name) or (), MOST_IDS, "entries")
    if asked.logit_bias:
        found["logit_bias"] = _biases(asked.logit_bias)
    if asked.stop:
        found["stop"] = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        _check_count(called.get("stop", "stop"), found["stop"], MOST_STOPS, "texts")
    if asked.only_experts is not None:
        found["only_experts"] = experts(asked.only_experts, llm)
    if asked.return_routed_experts or asked.return_routed_weights:
        found["routed_experts"] = True
    if (form := _form(asked)) is not None:
        found["structured"] = form
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        name = called.get("logprobs", "logprobs")
        raise ApiError(
            400, f"{name}: found {logprobs}, allowed: an integer from 0 to {MOST_LOGPROBS}", param=name
        )
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **found | more)
    except RequestError as error:
        name, _, told = str(error).partition(":")
        raise RequestError(f"{called.get(name, name)}:{told}") from error


def _check_count(name: str, found: Sized, most: int, what: str) -> None:
    if len(found) > most:
        raise ApiError(400, f"{name}: found {len(found)} {what}, allowed: {most}", param=name)


def template_variables(asked: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What the chat template gets beside messages and tools. Raises ApiError for a name that is taken."""
    variables = dict(asked.chat_template_kwargs or {})
    if taken := [name for name in RESERVED if name in variables]:
        told = f"chat_template_kwargs: {taken[0]!r} is taken; there is a field for it"
        raise ApiError(400, told, param="chat_template_kwargs")
    for name in ("add_generation_prompt", "continue_final_message", "documents"):
        if (value := getattr(asked, name, None)) is not None:
            variables[name] = value
    return variables


def excludes_schema(params: SamplingParams, schema: str | None) -> None:
    """Raises ApiError where two forms are asked for at once."""
    if schema is not None and params.structured is not None:
        raise ApiError(400, "response_format: cannot be had with structured_outputs", param="response_format")


def experts(named: list[str | int], llm: LLM) -> list[int]:
    """Numbers of experts given by name or number. Raises RequestError for one that is not there."""
    if not named:
        raise ApiError(400, "only_experts: found none, allowed: at least one expert", param="only_experts")
    if not llm.expert_names:
        raise ApiError(400, "only_experts: this model is dense, it has no experts", param="only_experts")
    numbers = []
    for name in named:
        if name not in llm.expert_names and not (
            isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(llm.expert_names)
        ):
            there = ", ".join(llm.expert_names)
            raise ApiError(
                400, f"only_experts: found {ascii(name)[:100]}, allowed: {there}", param="only_experts"
            )
        numbers.append(name if isinstance(name, int) else llm.expert_names.index(name))
    return numbers


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ApiError(400, "logit_bias: keys should be token ids", param="logit_bias") from None


def _form(asked: SamplingFields) -> StructuredOutput | None:
    """vLLM's ways to ask for a form."""
    given = {
        "json": asked.guided_json,
        "regex": asked.guided_regex,
        "choice": asked.guided_choice,
        "grammar": asked.guided_grammar,
    } | (asked.structured_outputs or {})
    known = ("json", "regex", "choice", "grammar", "json_object")
    found = {name: value for name, value in given.items() if value is not None and name in known}
    if asked.structured_outputs and (unknown := set(asked.structured_outputs) - set(known)):
        wrong = sorted(name for name in unknown if asked.structured_outputs[name] not in (None, False))
        if wrong:
            raise ApiError(
                400,
                f"structured_outputs.{wrong[0]}: this server does not know it",
                param="structured_outputs",
            )
    try:
        return StructuredOutput(**found) if found else None
    except RequestError as error:
        told = str(error).removeprefix("structured").lstrip(".")
        raise ApiError(
            400, f"structured_outputs{'' if told[:1] == ':' else '.'}{told}", param="structured_outputs"
        ) from error


def response_schema(form: Mapping[str, Any] | None, name: str = "response_format") -> str | None:
    """The JSON schema, as text, that OpenAI's response_format (or responses' text.format) asks for; None for plain text.
    Raises ApiError for a form that is none."""
    if form is None or form.get("type", "text") == "text":
        return None
    if form.get("type") == "json_object":
        return '{"type": "object"}'
    if form.get("type") == "json_schema":
        inner = form.get("json_schema", form)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping):
            return json.dumps(schema, ensure_ascii=False)
        raise ApiError(400, f"{name}: json_schema needs a 'schema', which is an object", param=name)
    raise ApiError(
        400,
        f"{name}: found type {ascii(form.get('type'))[:50]}, allowed: text, json_object, json_schema",
        param=name,
    )
