"""What clients may send, as pydantic models: types are checked here, values where they are used.

    asked = parse(ChatRequest, body)            # ApiError 400 that names the field

null stands for "not given" everywhere, since clients send null for every option they know. Fields that are not here are
accepted and left alone: clients send new ones all the time (store, metadata, service_tier, verbosity, ...). Fields that
would change the answer and cannot be honoured are named in UNABLE and NEUTRAL, and refused. Wire names are those of
OpenAI, vLLM and SGLang; `speakers`, `only_experts` and `return_routed_weights` are octad's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema

from octad.errors import RequestError
from octad.serve.replies import ApiError, shown

Asked = TypeVar("Asked", bound="Wire")
UNABLE: Mapping[str, str] = {
    "audio": "sound",
    "functions": "`functions`; use `tools`",
    "function_call": "`function_call`; use `tool_choice`",
    "web_search_options": "web search",
    "suffix": "text to insert before",
    "use_beam_search": "beam search",
    "previous_response_id": "stored responses; send the whole conversation as `input`",
    "conversation": "stored conversations; send the whole conversation",
    "background": "background responses",
    "chat_template": "templates of the client",
    "truncation_side": "cutting prompts",
    "truncate_prompt_tokens": "cutting prompts",
    "allowed_token_ids": "lists of allowed tokens; use `logit_bias` or `structured_outputs`",
    "bad_words": "words that may not be said; use `logit_bias`",
    "logits_processors": "clients' own processors",
    "prompt_logprobs": "`prompt_logprobs`; use completions with `echo` and `logprobs`",
    "echo": "`echo` of messages; use completions",
    "grammar": "grammars under this name; use `structured_outputs`",
    "ebnf": "grammars under this name; use `structured_outputs`",
    "regex": "patterns under this name; use `structured_outputs`",
    "json_schema": "schemas under this name; use `response_format`",
    "stop_regex": "patterns that stop",
    "lora_path": "adapters",
    "cache_salt": "caches of one's own",
    "mcp_servers": "servers of tools",
    "n_predict": "`n_predict`; use `max_tokens`",
    "max_new_tokens": "`max_new_tokens`; use `max_tokens`",
    "min_new_tokens": "`min_new_tokens`; use `min_tokens`",
}
NEUTRAL: Mapping[
    str, tuple[float, ...]
] = {  # other engines' samplers, at values that leave everything as it is
    "mirostat": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "length_penalty": (1,),
    "best_of": (1,),
    "no_repeat_ngram_size": (0,),
    "top_n_sigma": (-1, 0),
}


def _whole(value: Any) -> Any:
    """5.0 is 5: some languages write all numbers so."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _prompts(value: Any) -> Any:
    """A text, texts, ids, or lists of ids; looked at by kinds, since there may be millions."""
    kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
    if kinds == {list}:
        kinds = {int} | {kind for one in value for kind in set(map(type, one))}
    if isinstance(value, str) or (isinstance(value, list) and kinds in (set(), {str}, {int})):
        return value
    raise ValueError("should be a text, a list of texts, token ids, or a list of lists of them")


def _ids(value: Any) -> Any:
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        return value
    raise ValueError("should be a list of token ids")


Whole = Annotated[int, BeforeValidator(_whole)]
_IDS: Mapping[str, Any] = {"type": "array", "items": {"type": "integer"}}
_PROMPTS: list[Any] = [
    {"type": "string"},
    {"type": "array", "items": {"type": "string"}},
    _IDS,
    {"type": "array", "items": _IDS},
]
Ids = Annotated[Any, BeforeValidator(_ids), WithJsonSchema(dict(_IDS))]
Prompts = Annotated[Any, BeforeValidator(_prompts), WithJsonSchema({"anyOf": _PROMPTS})]
SomePrompts = Annotated[
    Any,
    BeforeValidator(lambda value: None if value is None else _prompts(value)),
    WithJsonSchema({"anyOf": [*_PROMPTS, {"type": "null"}]}),
]


class Wire(BaseModel):
    """The base: strict types, unknown fields allowed."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(Wire):
    """stream_options."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Wire):
    """What all endpoints that answer share: OpenAI's options, then vLLM's, then octad's."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: Whole | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Whole | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_routed_experts: bool | None = None
    return_routed_weights: bool | None = None
    routed_experts_prompt_start: int | None = None
    return_token_ids: bool | None = None
    only_experts: list[str | int] | None = None
    speakers: bool | None = None


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[Any]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[Any] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: SomePrompts = None
    echo: bool | None = None
    logprobs: Whole | None = None
    best_of: Whole | None = None
    response_format: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class ResponsesRequest(SamplingFields):
    """POST /v1/responses."""

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None


class MessagesRequest(SamplingFields):
    """POST /v1/messages and /v1/messages/count_tokens (which needs no max_tokens)."""

    messages: list[Any]
    system: str | list[Any] | None = None
    stop_sequences: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


class EmbeddingRequest(Wire):
    """POST /v1/embeddings."""

    input: Prompts
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


class TokenizeRequest(Wire):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Wire):
    """POST /detokenize."""

    tokens: Ids
    model: str | None = None


def parse(model: type[Asked], body: dict[str, Any]) -> Asked:
    """The body as this model. Raises ApiError 400, with the field's name, for the first thing that is wrong."""
    for name, what in UNABLE.items():
        if body.get(name) not in (None, False, "", [], {}) and name not in model.model_fields:
            raise ApiError(
                400, f"{name}: this server does not know {what}", param=name, code="unsupported_parameter"
            )
    for name, values in NEUTRAL.items():
        if body.get(name) not in (None, False, *values) and name not in model.model_fields:
            raise ApiError(
                400, f"{name}: this server does not have it", param=name, code="unsupported_parameter"
            )
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "missing":
            raise ApiError(
                400, f"{field}: is missing", param=field, code="missing_required_parameter"
            ) from None
        found = shown(body.get(field) if field else body)
        raise ApiError(
            400,
            f"{field}: found {found}, which is of the wrong type: {first['msg'].lower()}",
            param=field,
            code="invalid_type",
        ) from None


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises RequestError for a value that is none of these."""
    if value not in allowed:
        raise RequestError(f"{name}: found {shown(value)}, allowed: {', '.join(allowed)}")


def check_absent(asked: Wire, told: Mapping[str, str]) -> None:
    """Raises ApiError for fields that this path does not have; `told`: what to do instead."""
    for name, instead in told.items():
        if getattr(asked, name, None) not in (None, False):
            raise ApiError(
                400, f"{name}: is not of this path; {instead}", param=name, code="unsupported_parameter"
            )


def check_one_answer(asked: SamplingFields) -> None:
    """Raises ApiError for what neither responses nor messages have a place for."""
    names = ("speakers", "return_routed_experts", "return_routed_weights", "return_token_ids")
    check_absent(asked, dict.fromkeys(names, "use /v1/chat/completions"))
    if asked.n not in (None, 1):
        raise ApiError(400, f"n: found {asked.n}, allowed: 1 at this path", param="n")
