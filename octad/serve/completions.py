"""POST /v1/completions: texts or token ids in, their continuations out; with echo and logprobs, the scores of the prompt.

    response = await completions(request, generator, names)

What lm-eval's local-completions asks: lists of prompts as token ids, echo, logprobs, one new token. A list of N prompts
with n answers each gives N n choices, in order.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from octad.engine.detokenize import token_text
from octad.engine.outputs import RequestOutput, TokenLogprobs
from octad.engine.params import StructuredOutput
from octad.serve.chat_completions import LEAST_LOGPROB, routes, speakers, traced, usage, usage_so_far
from octad.serve.event_stream import EventStream, frame, told_to_the_end, unless_gone
from octad.serve.generation import Generator, Job, Piece
from octad.serve.limits import read_body
from octad.serve.listing import ModelNames
from octad.serve.protocol import CompletionRequest, parse
from octad.serve.replies import ApiError
from octad.serve.sampling_options import excludes_schema, response_schema, sampling

DEFAULT_TOKENS = 16
MOST_PROMPTS = 2048


async def completions(request: Request, generator: Generator, names: ModelNames) -> Response:
    """The endpoint; `names` are those that the model answers to."""
    asked = parse(CompletionRequest, await read_body(request))
    model = names.of(asked.model)
    job = await unless_gone(request, _begin(asked, generator))
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
    if asked.stream:
        return EventStream(
            told_to_the_end(_chunks(asked, job, head), usage(asked, job, head), job.close), job.close
        )
    try:
        return Response(await unless_gone(request, _whole(asked, job, head)), media_type="application/json")
    finally:
        job.close()


async def _begin(asked: CompletionRequest, generator: Generator) -> Job:
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise ApiError(400, "best_of: this server gives all answers; leave it out", param="best_of")
    limit = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    if limit == 0 and not asked.echo:
        raise ApiError(400, "max_tokens: found 0, allowed: at least 1, or 0 with echo", param="max_tokens")
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise ApiError(400, "stream: echo with logprobs comes whole; leave out stream", param="stream")
    scored = asked.logprobs if asked.echo else None
    more: dict[str, Any] = {"prompt_logprobs": scored} if scored is not None else {}
    params = sampling(asked, generator.llm, limit or 1, asked.logprobs, chat=False, **more)
    field, schema = "structured_outputs", response_schema(asked.response_format)
    excludes_schema(params, schema)
    if schema is not None:
        field, params = "response_format", replace(params, structured=StructuredOutput(json=schema))
    prompts = await generator.aside(lambda: encoded_prompts(asked, generator))
    return await generator.submit(prompts, params, field=field)


def encoded_prompts(asked: CompletionRequest, generator: Generator) -> list[list[int]]:
    """Every prompt as ids; nothing at all is what the model begins a text with."""
    given: Any = asked.prompt if asked.prompt is not None else ""
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    batch = [given] if one else list(given)
    if not batch or len(batch) > MOST_PROMPTS:
        raise ApiError(
            400, f"prompt: found {len(batch)} prompts, allowed: 1 to {MOST_PROMPTS}", param="prompt"
        )
    tokenizer, special = generator.llm.tokenizer, asked.add_special_tokens is not False
    found = []
    for prompt in batch:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, add_special_tokens=special, parse_special=False)
        if not prompt:
            begin = next(
                (t for t in (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.eos_ids) if t is not None), 0
            )
            prompt = [begin]
        found.append(list(prompt))
    return found


async def _whole(asked: CompletionRequest, job: Job, head: dict[str, Any]) -> bytes:
    texts: dict[int, list[Piece]] = {}
    async for piece in job.pieces():
        texts.setdefault(piece.index, []).append(piece)
    if asked.max_tokens == 0:
        job.usage.answered = 0
    n = job.params.n
    choices = (
        _choice(asked, index, job, texts.get(index, []), job.outputs[index // n], index % n)
        for index in range(len(job.streams) * n)
    )
    return await job.body(head | {"usage": job.usage.as_openai()}, choices)


def _choice(
    asked: CompletionRequest, index: int, job: Job, pieces: list[Piece], output: RequestOutput, which: int
) -> dict[str, Any]:
    silent = asked.max_tokens == 0  # one token was made and is not shown
    text = "" if silent else "".join(piece.text for piece in pieces)
    answer = output.outputs[which]
    prompt = _prompt_text(asked, job, index // job.params.n) if asked.echo else ""
    choice: dict[str, Any] = {
        "index": index,
        "text": prompt + text,
        "logprobs": None,
        "finish_reason": "length" if silent else answer.finish_reason,
        "stop_reason": None if silent else answer.stop_reason,
    }
    if asked.logprobs is not None:
        scored = list(output.prompt_logprobs or []) if asked.echo else []
        ids = list(output.prompt_token_ids) if asked.echo else []
        if not silent:
            scored += answer.logprobs or []
            ids += answer.token_ids
        choice["logprobs"] = logprob_lists(job, ids, scored)
    if asked.speakers:
        choice["speakers"] = speakers([p.delta for p in pieces if p.delta], job.generator.names, text)
    if asked.return_token_ids:
        choice |= {"token_ids": list(answer.token_ids), "prompt_token_ids": list(output.prompt_token_ids)}
    return choice | routes(asked, output, which)


def _prompt_text(asked: CompletionRequest, job: Job, place: int) -> str:
    given = asked.prompt
    if isinstance(given, str):
        return given
    if given and isinstance(given[0], str):
        return str(given[place])
    return job.generator.llm.tokenizer.decode(job.prompts[place], skip_special_tokens=False) if given else ""


def logprob_lists(
    job: Job, ids: Sequence[int], scored: Sequence[TokenLogprobs | None], begin: int = 0
) -> dict[str, Any]:
    """OpenAI's four lists, an entry a token; None for the first token of a prompt, which nothing stands before."""
    tokens = [token_text(job.generator.llm.tokenizer, token) for token in ids]
    offsets = [begin]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    chosen = [None if place is None else max(place.chosen.logprob, LEAST_LOGPROB) for place in scored]
    tops: list[dict[str, float] | None] = [
        None
        if place is None
        else {t.text: max(t.logprob, LEAST_LOGPROB) for t in reversed((place.chosen, *place.top))}
        for place in scored
    ]
    return {
        "tokens": tokens,
        "token_logprobs": chosen,
        "top_logprobs": [_best_first(top) for top in tops],
        "text_offset": offsets[: len(tokens)],
    }


def _best_first(top: dict[str, float] | None) -> dict[str, float] | None:
    return None if top is None else dict(sorted(top.items(), key=lambda entry: -entry[1]))


async def _chunks(asked: CompletionRequest, job: Job, head: dict[str, Any]) -> AsyncGenerator[bytes]:
    used = usage_so_far(asked, job)

    def chunk(index: int, text: str, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason} | more
        return frame(head | {"choices": [choice]} | used())

    offsets: dict[int, int] = {}
    if asked.echo:
        for index in range(len(job.streams) * job.params.n):
            yield chunk(index, _prompt_text(asked, job, index // job.params.n))
    async for piece in job.pieces():
        more: dict[str, Any] = {"stop_reason": piece.delta.stop_reason if piece.delta else None}
        if piece.delta and asked.logprobs is not None:
            lists = logprob_lists(
                job, piece.delta.token_ids, piece.delta.logprobs or (), offsets.get(piece.index, 0)
            )
            offsets[piece.index] = offsets.get(piece.index, 0) + sum(map(len, lists["tokens"]))
            more["logprobs"] = lists
        if piece.delta and asked.speakers:
            more["speakers"] = speakers([piece.delta], job.generator.names, piece.text)
        if piece.delta and asked.return_token_ids:
            more["token_ids"] = list(piece.delta.token_ids)
        if asked.max_tokens == 0:  # one token was made and is not shown
            yield chunk(piece.index, "", "length")
        elif piece.text or piece.finish_reason or len(more) > 1:
            yield chunk(piece.index, piece.text, piece.finish_reason, **more)
    if asked.max_tokens == 0:
        job.usage.answered = 0
    if traced(asked):
        for place, output in job.outputs.items():
            for which in range(job.params.n):
                yield chunk(place * job.params.n + which, "", **routes(asked, output, which))
