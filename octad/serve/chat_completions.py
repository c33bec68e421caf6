"""POST /v1/chat/completions: a conversation in, a message out, whole or in pieces.

    response = await chat_completions(request, generator, names)

Beside OpenAI's fields: `speakers: true` asks who said each token ([{"token", "expert", "weight"}], the tokens' texts
joined are the content of their chunk), `return_routed_experts` the whole routing, `only_experts` masks the others.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octad.engine.detokenize import token_bytes
from octad.engine.outputs import CompletionOutput, Delta, RequestOutput, TokenLogprob
from octad.serve.event_stream import EventStream, frame, told_to_the_end, unless_gone
from octad.serve.generation import Generator, Job, Piece
from octad.serve.limits import read_body
from octad.serve.listing import ModelNames
from octad.serve.npy import routes_of, weights_of
from octad.serve.protocol import ChatRequest, CompletionRequest, SamplingFields, parse
from octad.serve.replies import ApiError, encoded
from octad.serve.sampling_options import response_schema, sampling, template_variables
from octad.serve.tool_calls import Toolbox

MARK = "\ufdd2"  # a Unicode noncharacter: where a text goes
LEAST_LOGPROB = -9999.0  # of what cannot be; JSON has no infinity


async def chat_completions(request: Request, generator: Generator, names: ModelNames) -> Response:
    """The endpoint; `names` are those that the model answers to."""
    asked = parse(ChatRequest, await read_body(request))
    model = names.of(asked.model)
    job = await unless_gone(request, begin(asked, generator))
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
    if asked.stream:
        return EventStream(
            told_to_the_end(_chunks(asked, job, head), usage(asked, job, head), job.close), job.close
        )
    try:
        return Response(await unless_gone(request, _whole(asked, job, head)), media_type="application/json")
    finally:
        job.close()


def usage(asked: ChatRequest | CompletionRequest, job: Job, head: dict[str, Any]) -> Callable[[], bytes]:
    """The last chunk of a stream, which tells what was used, where the client asked for it."""
    counted = bool(asked.stream_options and asked.stream_options.include_usage)
    kind = {"object": "chat.completion.chunk"} if isinstance(asked, ChatRequest) else {}
    return lambda: frame(head | kind | {"choices": [], "usage": job.usage.as_openai()}) if counted else b""


def usage_so_far(asked: SamplingFields, job: Job) -> Callable[[], dict[str, Any]]:
    """What a chunk says of it: nothing, null where it comes at the end, or (vLLM's option) what it is by now."""
    options = asked.stream_options
    if options is not None and options.continuous_usage_stats:
        return lambda: {"usage": job.usage.as_openai()}
    return lambda: {"usage": None} if options is not None and options.include_usage else {}


async def begin(asked: ChatRequest, generator: Generator) -> Job:
    """The request, submitted. Raises ApiError or OctadError for what cannot be served."""
    if asked.modalities and asked.modalities != ["text"]:
        raise ApiError(400, "modalities: this server answers with text alone", param="modalities")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    limit, called = asked.max_tokens, {"logprobs": "top_logprobs"}
    if asked.max_completion_tokens is not None:
        limit, called = asked.max_completion_tokens, called | {"max_tokens": "max_completion_tokens"}
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    params = sampling(asked, generator.llm, limit, logprobs, called)
    toolbox = Toolbox.of(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    schema = response_schema(asked.response_format)
    return await generator.chat(asked.messages, params, toolbox, schema, template_variables(asked))


async def _whole(asked: ChatRequest, job: Job, head: dict[str, Any]) -> bytes:
    answers = [Gathered() for _ in range(job.params.n)]
    async for piece in job.pieces():
        answers[piece.index].add(piece)
    ids = {"prompt_token_ids": job.prompts[0]} if asked.return_token_ids else {}
    about = head | {
        "object": "chat.completion",
        "usage": job.usage.as_openai(),
        "system_fingerprint": None,
        "service_tier": None,
        **ids,
    }
    made = (
        _choice(asked, answer, job, output)
        for answer, output in zip(answers, job.outputs[0].outputs, strict=True)
    )
    return await job.body(about, made)


class Gathered:
    """One answer, joined from its pieces."""

    def __init__(self) -> None:
        self.text, self.reason = "", ""
        self.calls: list[dict[str, Any]] = []
        self.deltas: list[Delta] = []

    def add(self, piece: Piece) -> None:
        """One piece more."""
        self.text += piece.text
        for call in piece.calls:
            if call.name is not None:
                function = {"name": call.name, "arguments": ""}
                self.calls.append({"id": call.id, "type": "function", "function": function})
            self.calls[call.index]["function"]["arguments"] += call.arguments
        if piece.delta is not None:
            self.deltas.append(piece.delta)
        self.reason = piece.finish_reason or self.reason


def _choice(asked: ChatRequest, answer: Gathered, job: Job, output: CompletionOutput) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.calls else None,
        "refusal": None,
    }
    if answer.calls:
        message["tool_calls"] = answer.calls
    choice = {
        "index": output.index,
        "message": message,
        "logprobs": _logprobs(asked, answer.deltas, job),
        "finish_reason": answer.reason,
        "stop_reason": output.stop_reason,
    }
    ids = {"token_ids": list(output.token_ids)} if asked.return_token_ids else {}
    more = _extras(asked, answer.deltas, job, answer.text) | routes(asked, job.outputs[0], output.index)
    return choice | ids | more


def _extras(asked: ChatRequest, deltas: list[Delta], job: Job, content: str) -> dict[str, Any]:
    if not asked.speakers:
        return {}
    return {"speakers": speakers(deltas, job.generator.names, content)}


def routes(asked: ChatRequest | CompletionRequest, output: RequestOutput, index: int) -> dict[str, Any]:
    """The whole routing of an answer and its weights, as far as the client asked."""
    found = {"routed_experts": routes_of(output, index)} if asked.return_routed_experts else {}
    return found | ({"routed_weights": weights_of(output, index)} if asked.return_routed_weights else {})


def traced(asked: ChatRequest | CompletionRequest) -> bool:
    """Whether something of the routing comes at the end."""
    return bool(asked.return_routed_experts or asked.return_routed_weights)


def speakers(deltas: list[Delta], names: list[str], content: str) -> list[dict[str, Any]]:
    """Who said what: an entry a token, with what the token made known of the text. Where the content is not the tokens'
    texts (calls are cut out of it), it goes to the first of them that spoke."""
    found = [
        {"token": delta.text, "expert": names[speaker], "weight": round(share, 4)}
        for delta in deltas
        for speaker, share in zip(delta.speakers or (), delta.speaker_shares or (), strict=True)
    ]
    if found and "".join(str(entry["token"]) for entry in found) != content:
        found = [entry | {"token": ""} for entry in found]
        found[0]["token"] = content
    return found


def _logprobs(asked: ChatRequest, deltas: list[Delta], job: Job) -> dict[str, Any] | None:
    return {"content": token_entries(deltas, job), "refusal": None} if asked.logprobs else None


def token_entries(deltas: Iterable[Delta], job: Job) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities as OpenAI tells them. `bytes` are the token's own, also where it is a part of a
    character: all of them joined are the text."""
    tokenizer = job.generator.llm.tokenizer

    def entry(token: TokenLogprob) -> dict[str, Any]:
        own = list(token_bytes(tokenizer, token.token_id))
        return {"token": token.text, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": own}

    places = [place for delta in deltas for place in delta.logprobs or ()]
    return [entry(place.chosen) | {"top_logprobs": [entry(token) for token in place.top]} for place in places]


async def _chunks(asked: ChatRequest, job: Job, head: dict[str, Any]) -> AsyncGenerator[bytes]:
    head = head | {"object": "chat.completion.chunk", "system_fingerprint": None}
    used = usage_so_far(asked, job)

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason} | more
        return frame(head | {"choices": [choice]} | used())

    if asked.return_token_ids:  # once, in a chunk of its own
        yield frame(head | {"choices": [], "prompt_token_ids": job.prompts[0]} | used())
    for index in range(job.params.n):
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    last: dict[int, tuple[str, Any]] = {}
    frames = {}
    moving = asked.stream_options is not None and asked.stream_options.continuous_usage_stats
    if not (moving or asked.logprobs or asked.speakers or asked.return_token_ids):
        frames = {i: tuple(chunk(i, {"content": MARK}).split(encoded(MARK))) for i in range(job.params.n)}
    async for piece in job.pieces():
        if frames and piece.finish_reason is None and not piece.calls:  # most tokens: only the text is new
            if piece.text:
                before, after = frames[piece.index]
                yield before + encoded(piece.text) + after
            continue
        if (told := _chunk_parts(asked, job, piece)) is not None:
            yield chunk(piece.index, *told[:1], **told[1])
        if piece.finish_reason is not None:
            last[piece.index] = piece.finish_reason, piece.delta.stop_reason if piece.delta else None
            if not traced(asked):
                yield chunk(piece.index, {}, piece.finish_reason, stop_reason=last[piece.index][1])
    if traced(asked):
        for index, (reason, stopped) in sorted(last.items()):
            more = routes(asked, job.outputs[0], index)
            yield chunk(index, {}, reason, stop_reason=stopped, **more)


def _chunk_parts(asked: ChatRequest, job: Job, piece: Piece) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The delta and what goes beside it; None where there is nothing to tell."""
    delta: dict[str, Any] = {}
    if piece.text:
        delta["content"] = piece.text
    if piece.calls:
        delta["tool_calls"] = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.name is None
            else {
                "index": call.index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in piece.calls
        ]
    deltas = [piece.delta] if piece.delta else []
    more: dict[str, Any] = {}
    if asked.logprobs and deltas:
        more["logprobs"] = _logprobs(asked, deltas, job)
    if asked.speakers and deltas:
        more["speakers"] = speakers(deltas, job.generator.names, piece.text)
    if asked.return_token_ids and deltas:
        more["token_ids"] = [token for one in deltas for token in one.token_ids]
    if not delta and not any(more.get(name) for name in ("logprobs", "speakers", "token_ids")):
        return None
    return delta, more
