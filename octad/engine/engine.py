"""Engine: many requests at once through one model, one forward pass a step.

    engine = Engine(model, tokenizer, EngineConfig())
    engine.add_request("a", tokenizer.encode("Once"), SamplingParams())
    while engine.has_unfinished():
        for delta in engine.step(): ...
    engine.output("a").outputs[0].text

Requests come and go between steps: decoding is bound by reading the weights, so that a step with sixteen sequences costs
little more than one with a single sequence. What the model computes for a request does not depend on the others; only the
order of floating-point sums may. Text, files and printing are other people's business: prompts are token ids.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from octad.engine.answer import Answer
from octad.engine.block_manager import BlockManager
from octad.engine.detokenize import token_text
from octad.engine.model_runner import ModelRunner, Stacked
from octad.engine.outputs import Delta, RequestMetrics, RequestOutput
from octad.engine.sampling import Sampler, SamplingState
from octad.engine.scheduler import Piece, Scheduler
from octad.engine.sequence import Request
from octad.engine.sequence import Sequence as Sequence_
from octad.engine.structured import GrammarCompiler
from octad.errors import RequestError
from octad.kernels.paged import PagedAttention, paged_attention
from octad.model.observe import mixtures, speakers
from octad.model.paged_cache import affordable_blocks

if TYPE_CHECKING:
    from octad.engine.params import SamplingParams
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine; None means: derive from the model and the free memory.

    block_size: tokens a block of the key/value cache. num_blocks, or kv_cache_gb (10^9 bytes): size of that cache.
    max_num_seqs: answers in progress at once. max_num_batched_tokens: tokens a forward pass at most; long prompts are cut
    into chunks of this. max_model_len: tokens of prompt and answer together.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_gb: float | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None and not isinstance(value, bool) and not value > 0:
                raise RequestError(f"{entry.name}: found {value!r}, allowed: a number above 0")


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
    """Continuous batching over a paged cache. Not thread-safe: one thread calls it.

    `attention` is any function with paged_attention's signature. `max_model_len` is the context that there is: the
    model's or the config's, or what the whole cache holds if that is less.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        attention: PagedAttention = paged_attention,
    ) -> None:
        config = config or EngineConfig()
        self.model, self.tokenizer, self.config = model, tokenizer, config
        longest = _context(config, model.config.max_position_embeddings)
        num_blocks = config.num_blocks or affordable_blocks(
            model, config.block_size, config.kv_cache_gb, config.max_num_seqs * longest
        )
        self.max_model_len = min(longest, num_blocks * config.block_size)
        self.runner = ModelRunner(model, num_blocks, config.block_size, attention)
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.sampler = Sampler(partial(token_text, tokenizer))
        self.eos_ids: tuple[int, ...] = tokenizer.eos_ids or model.config.eos_token_ids
        self.grammars = GrammarCompiler(tokenizer, self.eos_ids)
        self.requests: dict[str, Request] = {}
        self.answers: dict[Request, list[Answer]] = {}
        self._arrivals = self._resets = self._prompt_tokens = self._generated_tokens = 0

    # ---- requests ------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, prompt_text: str | None = None
    ) -> None:
        """Queue a prompt. Raises RequestError for an empty prompt, one that can never fit, ids that the model does not
        have, a schema that does not compile, or a request id in use.

        A request for routing traces computes its whole prompt: what is in the prefix cache left no trace.
        """
        self._check(request_id, prompt, params)
        self._arrivals += 1
        traced = params.routed_experts and bool(mixtures(self.model))
        shared = self.config.enable_prefix_caching and not traced
        salt = f"{self._resets}" if shared else f"{self._resets} {self._arrivals}"
        metrics = RequestMetrics(time.monotonic())
        request = Request(
            request_id, list(prompt), params, metrics, self._arrivals, salt.encode(), prompt_text
        )
        request.traced = traced
        self.answers[request] = [self._answer(sequence) for sequence in request.sequences]
        self.requests[request_id] = request
        self.scheduler.add(request)
        self._prompt_tokens += len(prompt)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Stop a request and forget it; what it had so far (finish_reason "abort"), None for an unknown id."""
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
        request = self.requests.get(request_id)
        if request is None:
            raise RequestError(f"request {request_id!r}: there is none; it was never added, or handed out")
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
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        traced = any(piece.sequence.request.traced for piece in pieces)
        logits_RV, routing = self.runner.run(pieces, traced)
        ready = [self.answers[p.sequence.request][p.sequence.index] for p in pieces if p.last]
        sampled = self.sampler.sample(logits_RV, [answer.state for answer in ready])
        # so far nothing has changed but blocks that were handed out: a step that was interrupted can be repeated
        said = self._record(pieces, routing) if routing else {}
        self.scheduler.computed(pieces)
        deltas = [a.take(s, said.get(a.sequence)) for a, s in zip(ready, sampled, strict=True)]
        self._generated_tokens += len(ready)
        self._settle(ready)
        return deltas

    def _record(self, pieces: Sequence[Piece], routing: Stacked) -> dict[Sequence_, int]:
        """Keep the routing of the sequences that asked for it; says who speaks next in each."""
        said: dict[Sequence_, int] = {}
        end = 0
        for piece in pieces:
            start, end = end, end + piece.count
            sequence = piece.sequence
            trace = self.answers[sequence.request][sequence.index].trace
            if trace is None:
                continue
            experts_SLA, weights_SLA = routing[0][start:end], routing[1][start:end]
            trace.write(piece.start, experts_SLA, weights_SLA)
            if piece.last:
                said[sequence] = speakers(experts_SLA[-1:], weights_SLA[-1:])[0]
        return said

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

    def _check(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        vocabulary = self.model.config.vocab_size
        if request_id in self.requests:
            raise RequestError(f"request {request_id!r}: this id is in use; choose another")
        if not prompt:
            raise RequestError("the prompt is empty; give some text")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, the context {self.max_model_len} with the answer"
                f"{self._why_so_short()}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError(
                f"the prompt holds ids outside 0..{vocabulary - 1}; encode it with this model's tokenizer"
            )
        params.check_vocabulary(vocabulary)

    def _why_so_short(self) -> str:
        given = _context(self.config, self.model.config.max_position_embeddings)
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


def _context(config: EngineConfig, model: int) -> int:
    """Tokens of prompt and answer that the config allows; raises RequestError for more than the model has."""
    if (config.max_model_len or 0) > model:
        raise RequestError(f"max_model_len: found {config.max_model_len}, the model's context is {model}")
    return config.max_model_len or model
