"""Engine: many requests at once through one model, one forward pass a step.

    engine = Engine(model, tokenizer, EngineConfig())
    engine.add_request("a", tokenizer.encode("Once"), SamplingParams())
    while engine.has_unfinished():
        for delta in engine.step(): ...
    engine.output("a").outputs[0].text

Requests come and go between steps: decoding is bound by reading the weights, so that a step with sixteen sequences costs
little more than one with a single sequence. What the model computes for a request does not depend on the others; only the
order of floating-point sums may. Text, files and printing are other people's business: prompts are token ids.

Programs use it through an EngineLoop, whose one thread calls `step`; a lock keeps a second caller from doing harm. What
can take long, checking a request and compiling its form, is `prepare`, which any thread may do.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from octad.engine.answer import Answer
from octad.engine.block_manager import BlockManager
from octad.engine.detokenize import token_text
from octad.engine.model_runner import ModelRunner, Ran
from octad.engine.outputs import Delta, RequestMetrics, RequestOutput, TokenLogprobs
from octad.engine.prompts import check_request, end_ids, token_ids
from octad.engine.sampling import Sampler, SamplingState
from octad.engine.scheduler import Piece, Scheduler
from octad.engine.sequence import Request
from octad.engine.sequence import Sequence as Sequence_
from octad.engine.structured import GrammarCompiler
from octad.errors import RequestError
from octad.kernels.paged import PagedAttention, paged_attention
from octad.model.observe import Speaker, said
from octad.model.paged_cache import affordable_blocks

if TYPE_CHECKING:
    import torch

    from octad.engine.params import SamplingParams
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Tokenizer

SCORED_ROWS = 64  # rows of logits at a time, of prompts that are scored


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; None means: derive from the model and the free memory.

    block_size: tokens a block of the key/value cache. num_blocks, or kv_cache_gb (10^9 bytes): size of that cache.
    max_num_seqs: answers in progress at once. max_num_batched_tokens: tokens a forward pass at most; long prompts are cut
    into chunks of this.
    max_model_len: tokens of prompt and answer together. cuda_graphs: on CUDA, launch a step of decoding as one.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_gb: float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    cuda_graphs: bool = True
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and not isinstance(value, bool) and not 0 < value < math.inf:
                raise RequestError(f"{entry.name}: found {value!r}, allowed: a number above 0")


@dataclass(frozen=True)
class Prepared:
    """A request that has been checked, with its answers; the engine has not heard of it."""

    request: Request
    answers: list[Answer]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot: sequences running and waiting, blocks, and counts since the engine began."""

    running: int
    waiting: int
    free_blocks: int
    num_blocks: int
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int


class Engine:
    """Continuous batching over a paged cache.

    `attention` is any function with paged_attention's signature. `max_model_len` is the context that there is: the
    model's or the config's, or what the whole cache holds if that is less. `grammars`: where forms were compiled already.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        attention: PagedAttention = paged_attention,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        config = config or EngineConfig()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        longest = context_of(config, model.config.max_position_embeddings)
        num_blocks = config.num_blocks or affordable_blocks(
            model, config.block_size, config.kv_cache_gb, config.max_num_seqs * longest
        )
        self.max_model_len = min(longest, num_blocks * config.block_size)
        self.runner = ModelRunner(model, num_blocks, config.block_size, attention, config.cuda_graphs)
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.sampler = Sampler(partial(token_text, tokenizer), drawing=self.runner.drawing)
        self.eos_ids = end_ids(tokenizer, model.config)
        self.grammars = grammars or GrammarCompiler(tokenizer, self.eos_ids)
        self.requests: dict[str, Request] = {}
        self.answers: dict[Request, list[Answer]] = {}
        self._arrivals = self._resets = self._prompt_tokens = self._generated_tokens = 0
        self._lock = threading.RLock()

    # ---- requests ------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, prompt_text: str | None = None
    ) -> None:
        """Queue a prompt. Raises RequestError for an empty prompt, one that can never fit, ids or experts that the model
        does not have, a form that does not compile, or a request id in use.

        A request for routing traces, or for its prompt's log-probabilities, computes what it wants to see: that much of
        the prompt is not taken from the prefix cache.
        """
        self.enqueue(self.prepare(request_id, prompt, params, prompt_text))

    def prepare(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, prompt_text: str | None = None
    ) -> Prepared:
        """The request with its answers, checked and not yet queued; for any thread. Raises as add_request does."""
        ids = token_ids(prompt)
        self._check(ids, params)
        request = Request(request_id, ids, params, RequestMetrics(time.monotonic()), text=prompt_text)
        request.traced = params.routed_experts and self.runner.watch.mixed
        if request.traced:
            request.max_cached = params.routed_experts_prompt_start
        if params.prompt_logprobs is not None:
            request.max_cached = 0
            request.prompt_logprobs = [None] * len(ids)
        return Prepared(request, [self._answer(sequence) for sequence in request.sequences])

    def enqueue(self, prepared: Prepared, sink: Callable[[Delta], None] | None = None) -> None:
        """Queue what `prepare` made. `sink` hears each of its deltas, whoever calls `step`. Raises RequestError for a
        request id in use."""
        request = prepared.request
        with self._lock:
            if request.request_id in self.requests:
                raise RequestError(f"request {request.request_id!r}: this id is in use; choose another")
            self._arrivals += 1
            request.arrival, request.sink, request.salt = self._arrivals, sink, self._salt(request.params)
            for sequence in request.sequences:
                sequence.order = (request.arrival, sequence.index)
            if not self.config.enable_prefix_caching:
                request.salt += f" {self._arrivals}".encode()
            self.answers[request] = prepared.answers
            self.requests[request.request_id] = request
            self.scheduler.add(request)
            self._prompt_tokens += len(request.prompt)

    def _salt(self, params: SamplingParams) -> bytes:
        """What keys the cached blocks: how often the cache was reset, and the experts that may work."""
        return f"{self._resets} {params.only_experts or ''}".encode()

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and forget it; what it had so far (finish_reason "abort"), None for an unknown id."""
        with self._lock:
            request = self.requests.get(request_id)
            if request is None:
                return None
            for sequence in request.sequences:
                if sequence.finish_reason is None:
                    sequence.finish_reason = "abort"
                    self.scheduler.finish(sequence)
            return self.output(request_id)

    def output(self, request_id: str) -> RequestOutput:
        """All that a request has so far. A finished request is handed out once and forgotten.

        Raises RequestError for an unknown id.
        """
        with self._lock:
            request = self.requests.get(request_id)
            if request is None:
                raise RequestError(
                    f"request {request_id!r}: there is none; it was never added, or handed out"
                )
            answers = self.answers[request]
            if request.finished:
                del self.requests[request_id], self.answers[request]
        experts, weights = answers[0].prompt_trace()
        return RequestOutput(
            request_id,
            request.text,
            list(request.prompt),
            [answer.output() for answer in answers],
            request.finished,
            request.num_cached_tokens or 0,
            request.metrics,
            experts,
            weights,
            request.prompt_logprobs,
        )

    def has_unfinished(self) -> bool:
        """True while any request waits or runs."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes: needed when the model's weights or routers change. Requests that were added before
        share among themselves, never with later ones."""
        self._resets += 1
        self.blocks.forget()

    @property
    def stats(self) -> EngineStats:
        """A snapshot of load and counters."""
        scheduler, blocks = self.scheduler, self.blocks
        return EngineStats(
            len(scheduler.running),
            len(scheduler.waiting),
            len(blocks.free),
            blocks.num_blocks,
            scheduler.prefix_hit_tokens,
            scheduler.preemptions,
            self._prompt_tokens,
            self._generated_tokens,
        )

    # ---- a step --------------------------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """One forward pass: schedule, run, sample. Returns what was added, at most one delta an answer; [] when idle
        or while prompts are still being read."""
        with self._lock:
            pieces = self.scheduler.schedule()
            if not pieces:
                return []
            ran = self.runner.run(pieces, True, partial(self._read, pieces))
            ready = [self.answers[p.sequence.request][p.sequence.index] for p in pieces if p.last]
            sampled = self.sampler.sample(ran.logits, [answer.state for answer in ready], ran.likeliest)
            # so far nothing has changed but blocks that were handed out: a step that was interrupted can be repeated
            speakers = self._record(pieces, ran) or [None] * len(ready)
            self.scheduler.computed(pieces)
            deltas = [a.take(s, speaker) for a, s, speaker in zip(ready, sampled, speakers, strict=True)]
            self._generated_tokens += len(ready)
            self._settle(ready)
            for answer, delta in zip(ready, deltas, strict=True):
                if (sink := answer.sequence.request.sink) is not None:
                    sink(delta)
            return deltas

    def _record(self, pieces: Sequence[Piece], ran: Ran) -> Sequence[Speaker | None]:
        """Keep the routing of the sequences that asked for it; says who speaks next in each that is ready. [] for a dense
        model."""
        if ran.routing is None:
            return []
        if ran.speakers is not None and not any(piece.sequence.request.traced for piece in pieces):
            return ran.speakers
        routing = ran.routing()
        ends = list(accumulate(piece.count for piece in pieces))
        for piece, end in zip(pieces, ends, strict=True):
            sequence = piece.sequence
            trace = self.answers[sequence.request][sequence.index].trace
            if trace is not None:
                rows = slice(end - piece.count, end)
                trace.write(piece.start, routing[0][rows], routing[1][rows])
        last = [end - 1 for piece, end in zip(pieces, ends, strict=True) if piece.last]
        if len(last) == len(routing[0]):
            return said(*routing)
        return said(routing[0][last], routing[1][last])

    def _read(self, pieces: Sequence[Piece], hidden_ND: torch.Tensor) -> None:
        """The log-probabilities of the prompts' own tokens, where somebody asked: of `hidden_ND`, a row a token."""
        end = 0
        for piece in pieces:
            begin, end = end, end + piece.count
            request = piece.sequence.request
            if request.prompt_logprobs is None or piece.sequence.index:
                continue
            wanted = request.prompt[piece.start + 1 : piece.start + piece.count + 1]
            found = self._scored(
                hidden_ND[begin : begin + len(wanted)], wanted, request.params.prompt_logprobs
            )
            request.prompt_logprobs[piece.start + 1 : piece.start + 1 + len(found)] = found

    def _scored(self, hidden_ND: torch.Tensor, wanted: list[int], count: int | None) -> list[TokenLogprobs]:
        """Of each row what `wanted` is worth there; the head runs on a few rows at a time."""
        found: list[TokenLogprobs] = []
        for at in range(0, len(wanted), SCORED_ROWS):
            tokens = wanted[at : at + SCORED_ROWS]
            logits_RV = self.model.head(hidden_ND[at : at + SCORED_ROWS])
            found += self.sampler.report(logits_RV, tokens, [count or 0] * len(tokens))
        return found

    def _settle(self, answers: Sequence[Answer]) -> None:
        """Free what has ended, and note when requests began to answer and when they were done."""
        now = time.monotonic()
        for answer in answers:
            sequence = answer.sequence
            request = sequence.request
            if request.metrics.first_token is None:
                request.metrics = replace(request.metrics, first_token=now)
            if sequence.finish_reason is not None:
                self.scheduler.finish(sequence)
                if request.finished:
                    request.metrics = replace(request.metrics, finished=now)

    # ---- checks --------------------------------------------------------------------------------------------

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        context, why = self.max_model_len, self._why_so_short()
        check_request(prompt, params, self.tokenizer, self.model.config, context, why)

    def _why_so_short(self) -> str:
        given = context_of(self.config, self.model.config.max_position_embeddings)
        return (
            ""
            if self.max_model_len == given
            else f" (all that the key/value cache holds; the model takes {given})"
        )

    def _answer(self, sequence: Sequence_) -> Answer:
        """The user's side of a sequence. Raises RequestError for a form that does not compile."""
        prompt, params = sequence.request.prompt, sequence.request.params
        matcher = self.grammars.compile(params.structured) if params.structured else None
        state = SamplingState(params, prompt, self.eos_ids, sequence.index, matcher)
        return Answer(sequence, state, self.tokenizer, self.eos_ids, self.max_model_len)


def context_of(config: EngineConfig, model: int) -> int:
    """Tokens of prompt and answer that the config allows; raises RequestError for more than the model has."""
    if (config.max_model_len or 0) > model:
        raise RequestError(f"max_model_len: found {config.max_model_len}, the model's context is {model}")
    return config.max_model_len or model
