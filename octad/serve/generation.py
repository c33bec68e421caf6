"""From a checked request to what comes out of the engine, in the one form that all endpoints translate.

    job = await generator.chat(messages, options, toolbox)            # submitted: errors are known before the first byte
    async for piece in job.pieces(): piece.index, piece.text, piece.calls, piece.finish_reason

Whole answers are joined from the same pieces as streams, so that both are the same. Encoding, checks and the compiling of
grammars are done on worker threads: neither the event loop nor the engine waits for them. Leaving `pieces` early, for
whatever reason, aborts what the engine does for the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from octad.engine.detokenize import UNDECODED
from octad.engine.llm import LLM
from octad.engine.loop import Stream
from octad.engine.outputs import Delta, RequestOutput
from octad.engine.params import SamplingParams, StructuredOutput
from octad.engine.sampling import BROKEN
from octad.errors import CheckpointError, DataError, RequestError
from octad.serve.call_forms import CallForm
from octad.serve.call_parsers import CallDelta, CallParser, mistral_id
from octad.serve.limits import Queue
from octad.serve.metrics import Metrics
from octad.serve.replies import ApiError, with_choices
from octad.serve.sampling_options import excludes_schema
from octad.serve.tool_calls import Toolbox

Result = TypeVar("Result")
NO_TOOLS = Toolbox((), "none")


@dataclass
class Usage:
    """Tokens of a request: what was sent, what of it was cached, what was answered."""

    prompt: int = 0
    cached: int = 0
    answered: int = 0

    def as_openai(self) -> dict[str, Any]:
        """The `usage` object of completions."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answered,
            "total_tokens": self.prompt + self.answered,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


@dataclass(frozen=True)
class Piece:
    """What one step brought to one answer. `finish_reason` with its last piece: stop, length, tool_calls."""

    index: int
    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    delta: Delta | None = None
    finish_reason: str | None = None


@dataclass
class Job:
    """Requests that were submitted together: one for each prompt, each with `n` answers."""

    generator: Generator
    streams: list[Stream]
    prompts: list[list[int]]
    params: SamplingParams
    toolbox: Toolbox
    places: ExitStack
    usage: Usage = field(default_factory=Usage)
    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None

    async def pieces(self) -> AsyncGenerator[Piece]:
        """All answers' pieces as they come; answer j of prompt i has index i * n + j."""
        n, metrics = self.params.n, self.generator.metrics
        parsers = {
            i: self.generator.form.parser(self.toolbox.callable)
            for i in range(n * len(self.streams))
            if self.toolbox.choice != "none"
        }
        self.usage.prompt = sum(map(len, self.prompts))
        cached = dict[int, int]()
        try:
            async for place, delta in _merged(self.streams):
                metrics.heard(self.streams[place].request_id, delta, self.generator.names)
                cached[place] = delta.num_cached_tokens
                self.usage.cached = sum(cached.values())
                self.usage.answered += len(delta.token_ids)
                index = place * n + delta.index
                yield _piece(index, delta, parsers.get(index), forced=self.toolbox.forced)
            for place, stream in enumerate(self.streams):
                self.outputs[place] = await stream.result()
        finally:
            self.close()

    async def body(self, about: Mapping[str, Any], choices: Iterable[Mapping[str, Any]]) -> bytes:
        """A whole answer as JSON; with log-probabilities, which may have megabytes, made off the event loop."""
        if self.params.logprobs is None and self.params.prompt_logprobs is None:
            return with_choices(about, choices)
        return await self.generator.aside(lambda: with_choices(about, choices))

    def expire(self) -> None:
        """The time for this job is over: who reads it hears so."""
        told = ApiError(
            408, f"the answer took longer than {self.generator.timeout:g} s", code="request_timeout"
        )
        for stream in self.streams:
            stream.close_soon()
            stream.fail(told)

    def close(self) -> None:
        """Abort what still runs and give the places back; once is enough, more does no harm."""
        if self.timer is not None:
            self.timer.cancel()
        for stream in self.streams:
            stream.close_soon()
            self.generator.metrics.closed(stream.request_id)
        self.places.close()


def _piece(index: int, delta: Delta, parser: CallParser | None, *, forced: bool) -> Piece:
    if delta.finish_reason == "error":
        raise ApiError(
            500,
            f"the answer failed: {delta.stop_reason}",
            code="model_failed" if delta.stop_reason == BROKEN else "structured_output_failed",
        )
    if delta.finish_reason == "length":  # what a cut left of a character is nothing that the model said
        delta = replace(delta, text=delta.text.rstrip(UNDECODED))
    if parser is None:
        return Piece(index, delta.text, (), delta, delta.finish_reason)
    found = list(parser.push(delta.text))
    if delta.finish_reason is not None and not (forced and delta.finish_reason == "length"):
        found += parser.finish()
    text = "".join(part for part in found if isinstance(part, str))
    calls = tuple(part for part in found if isinstance(part, CallDelta))
    reason: str | None = delta.finish_reason
    if reason == "stop" and parser.calls:
        reason = "tool_calls"
    return Piece(index, text, calls, delta, reason)


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all streams, each with its stream's place, as they come."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    waiting: dict[asyncio.Task[Delta | None], int] = {}

    async def following(stream: Stream) -> Delta | None:
        return await anext(stream, None)

    try:
        for place, stream in enumerate(streams):
            waiting[asyncio.ensure_future(following(stream))] = place
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place, found = waiting.pop(task), task.result()
                if found is not None:
                    waiting[asyncio.ensure_future(following(streams[place]))] = place
                    yield place, found
    finally:
        for task in waiting:
            task.cancel()


class Generator:
    """The model behind the endpoints. `names`: of the experts; `timeout`: seconds an answer may take, None for any."""

    def __init__(self, llm: LLM, queue: Queue, metrics: Metrics, timeout: float | None) -> None:
        self.llm, self.queue, self.metrics, self.timeout = llm, queue, metrics, timeout
        self.names, self.form = llm.expert_names, CallForm.of(llm.tokenizer)
        self._workers = ThreadPoolExecutor(4, "octad request")

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Done on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work)

    async def chat(
        self,
        messages: Sequence[Any],
        params: SamplingParams,
        toolbox: Toolbox,
        schema: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Job:
        """A conversation, submitted. `schema`: JSON that the answer must be where it is no call."""
        if not messages:
            raise ApiError(
                400, "messages: the conversation is empty; give at least one message", param="messages"
            )

        excludes_schema(params, schema)
        asked_in = "response_format" if schema is not None else "structured_outputs"

        def work() -> tuple[list[int], SamplingParams, str]:
            """The conversation as ids, what its tools or its schema ask of the sampler, and where they were asked for."""
            ids = self.encode(messages, toolbox, variables or {})
            own, field = params, asked_in
            if toolbox.choice != "none" and not (params.ignore_eos or params.min_tokens or params.structured):
                grammar = toolbox.grammar(schema, self.form)
                own = replace(params, structured=StructuredOutput(grammar=grammar))
                field = "tools"
            elif toolbox.choice != "none" and toolbox.forced:
                raise ApiError(400, "tool_choice: cannot be had with min_tokens, ignore_eos or another form")
            elif schema is not None:
                own = replace(params, structured=StructuredOutput(json=schema))
            if toolbox.choice != "none" and self.form.hidden:  # the parser has to see them
                own = replace(own, skip_special_tokens=False)
            return ids, own, field

        ids, own, field = await self.aside(work)
        return await self.submit([ids], own, toolbox, field)

    def encode(self, messages: Sequence[Any], toolbox: Toolbox, variables: Mapping[str, Any]) -> list[int]:
        """A conversation as ids. Raises ApiError 400 where the template or a message is at fault."""
        given = dict(variables)
        if toolbox.definitions:
            given |= {"tools": [dict(tool) for tool in toolbox.definitions]}
            given |= {} if self.form.native else {"calls_as_json": True}
        if self.form.kind.startswith("mistral"):
            messages = [_with_short_ids(message) for message in messages]
        if given.get("continue_final_message") and given.get("add_generation_prompt"):
            raise ApiError(
                400,
                "continue_final_message: cannot be had with add_generation_prompt",
                param="continue_final_message",
            )
        try:
            return self.llm.tokenizer.encode_chat(messages, **given)
        except DataError as error:
            raise ApiError(400, _without_label(str(error), self.llm), param="messages") from error
        except CheckpointError as error:
            told = _without_label(str(error), self.llm)
            raise ApiError(400, f"messages: {told}", param="messages", code="chat_template_error") from error

    async def submit(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        toolbox: Toolbox | None = None,
        field: str = "structured_outputs",
    ) -> Job:
        """Prompts, queued; all or none. `field`: where the client asked for the answers' form. Raises ApiError 429 where
        the queue is full, RequestError as the engine does."""
        if params.n > self.llm.engine.config.max_num_seqs:
            most = self.llm.engine.config.max_num_seqs
            raise ApiError(400, f"n: found {params.n}, allowed: an integer from 1 to {most}", param="n")
        places = ExitStack()
        places.enter_context(self.queue.place(len(prompts)))
        try:
            batch = [(ids, self._within(ids, params), None) for ids in prompts]
            working = asyncio.ensure_future(self.aside(lambda: self.llm.loop.submit_all(batch)))
            try:
                streams = await asyncio.shield(working)
            except asyncio.CancelledError:
                working.add_done_callback(_close_late)
                raise
        except BaseException as error:
            places.close()
            raise _about_form(error, field) from error
        for stream, ids in zip(streams, prompts, strict=True):
            self.metrics.began(stream.request_id, len(ids))
        job = Job(self, streams, list(prompts), params, toolbox or NO_TOOLS, places)
        if self.timeout is not None:
            job.timer = asyncio.get_running_loop().call_later(self.timeout, job.expire)
        return job

    def _within(self, ids: Sequence[int], params: SamplingParams) -> SamplingParams:
        """With as many tokens as the context and, for several answers, the cache leave."""
        engine = self.llm.engine
        left = max(1, engine.max_model_len - len(ids))
        if params.n > 1:
            room = engine.blocks.num_blocks * engine.blocks.block_size - len(ids)
            left = max(1, min(left, room // params.n))
        most = left if params.max_tokens is None else min(params.max_tokens, left)
        return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def _with_short_ids(message: Any) -> Any:
    """A message with ids of calls as Mistral's templates want them."""
    if not isinstance(message, Mapping):
        return message
    found = dict(message)
    if isinstance(name := found.get("tool_call_id"), str):
        found["tool_call_id"] = mistral_id(name)
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [
            dict(call) | {"id": mistral_id(str(call.get("id")))} if isinstance(call, Mapping) else call
            for call in calls
        ]
    return found


def _about_form(error: BaseException, field: str) -> BaseException:
    """An error about a form names the field that clients know."""
    text = str(error)
    if isinstance(error, RequestError) and text.startswith("structured"):
        return ApiError(400, f"{field}: {text.partition(': ')[2]}", param=field, code="invalid_schema")
    return error


def _close_late(task: asyncio.Task[list[Stream]]) -> None:
    """The client left while its request was being prepared."""
    if not task.cancelled() and task.exception() is None:
        for stream in task.result():
            stream.close_soon()


def _without_label(text: str, llm: LLM) -> str:
    """A message about the model's files without where they lie."""
    return text.removeprefix(f"{llm.tokenizer.label}: ")
