"""LLM: a model that answers, in Python.

    llm = LLM("mixture/")
    llm.generate(["Once upon", "def f("], SamplingParams(max_tokens=32))[0].outputs[0].text
    for delta in llm.stream_chat([{"role": "user", "content": "Hi"}]): print(delta.text, end="")
    async for delta in llm.astream("Once upon"): print(delta.text, end="")

Opens what `octad.checkpoint.load` opens, puts an Engine around it and speaks in text. The checkpoint's generation_config
is not applied: what SamplingParams says is what is sampled. Several streams can be open at once, and several threads may
ask: one thread owns the engine (octad.engine.loop).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from octad.dist import keep_freed_memory
from octad.engine.engine import Engine, EngineConfig
from octad.engine.loop import EngineLoop, Stream, Submission
from octad.engine.opened import Opened, expert_names, expert_number
from octad.engine.outputs import Delta, RequestOutput
from octad.engine.params import SamplingParams, own_sampling
from octad.errors import RequestError
from octad.fast.beginning import Begun, begin, may_begin
from octad.fast.loading import open_fast
from octad.fast.optimize import optimize

if TYPE_CHECKING:
    from octad.engine.structured import GrammarCompiler
    from octad.fast.expert_store import ExpertStore
    from octad.kernels.paged import PagedAttention
    from octad.model.config import ModelConfig
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Message, Tokenizer


class LLM:
    """A model opened from disk, or given as (model, tokenizer), with an engine around it.

    dtype: "auto" (what the hardware is fast at), "float32", "bfloat16" or "float16". device: "auto" (a GPU where there is
    one), "cpu", "cuda", "cuda:1". quantize: None, "int8" or "int4". native: use compiled kernels where they are there.
    memory: bytes (or "300MB") that experts may take; the others stay on the disk until a token is sent to them.
    begun: what `octad.fast.beginning` has begun to read of this model. Fields of EngineConfig can be given by name.
    A given model keeps its dtype and device, and is changed in place.

    >>> llm = octad.LLM("mixture")
    >>> answer = llm.generate("Once upon", octad.SamplingParams(max_tokens=4, temperature=0))[0].outputs[0]
    >>> len(answer.token_ids), answer.finish_reason
    (4, 'length')
    """

    tokenizer: Tokenizer
    config: ModelConfig
    engine: Engine
    expert_names: list[str]
    own_sampling: dict[str, Any]  # how the checkpoint says that it is sampled; the server's chats go by it
    dtype_note: str | None = None  # where "auto" chose another dtype than the checkpoint's, in one line

    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[Transformer, Tokenizer],
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        native: bool = True,
        memory: int | str | None = None,
        begun: Begun | None = None,
        engine: EngineConfig | None = None,
        **engine_options: Any,
    ) -> None:
        keep_freed_memory()
        if isinstance(model, tuple):
            if memory is not None:
                raise RequestError("memory: a model that is loaded is in memory; give its directory")
            self.model, self.tokenizer = model
            self.label, names = "(a model in memory)", expert_names(None, self.model.config.num_experts)
            attention = optimize(self.model, quantize=quantize, native=native)
            self._start(replace(engine or EngineConfig(), **engine_options), attention, names)
            return
        if begun is None and memory is None and native and may_begin(dtype, device):
            begun = begin(model, quantize)
        options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize, "native": native}
        with _ended(begun):
            opened = Opened.of(model, memory=memory, engine=engine, **options, **engine_options)
            self._load(opened, begun)

    @classmethod
    def of(cls, opened: Opened, begun: Begun | None = None) -> LLM:
        """The model that was opened, with its weights."""
        llm = cls.__new__(cls)
        keep_freed_memory()
        with _ended(begun):
            llm._load(opened, begun)
        return llm

    def _load(self, opened: Opened, begun: Begun | None) -> None:
        self.label, self.tokenizer, self.dtype_note = opened.source.label, opened.tokenizer, opened.dtype_note
        how: dict[str, Any] = {"quantize": opened.quantize, "native": opened.native, "memory": opened.memory}
        self.model, attention = open_fast(opened.source, opened.dtype, opened.device, begun=begun, **how)
        self._start(opened.settings, attention, opened.expert_names, opened.grammars)

    def _start(
        self,
        settings: EngineConfig,
        attention: PagedAttention,
        names: list[str],
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """The engine around a model that is there."""
        self.config, self.expert_names = self.model.config, names
        self.own_sampling = own_sampling(self.tokenizer.generation)
        self.engine = Engine(self.model, self.tokenizer, settings, attention, grammars)
        self.loop = EngineLoop(self.engine)
        self._only: int | None = None

    @property
    def expert_store(self) -> ExpertStore | None:
        """The experts' place in memory, with its counts, where `memory` was given."""
        from octad.fast.offloaded import find_store

        return find_store(self.model)

    # ---- text in, text out ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers of all prompts, in their order; `params` for all, or one each. Text is encoded with the model's own bos
        and with control tokens' spellings as plain text; ids are taken as they are.

        Raises RequestError, before anything runs, for a prompt that cannot be served.
        """
        batch: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        each = _for_each(params, len(batch))
        made = [self._submission(prompt, own) for prompt, own in zip(batch, each, strict=True)]
        streams = self.loop.submit_all(made, deltas=False)
        try:
            return self._finish(streams, each, progress)
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer(s) as they come. The request begins with the first `next` and closing the iterator aborts it."""
        stream = self.submit(prompt, params)
        try:
            yield from stream
        finally:
            stream.close()

    async def astream(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """The answer(s) as they come, in an event loop; leaving the loop early aborts the request."""
        stream = self.submit(prompt, params)
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()

    def submit(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, deltas: bool = True
    ) -> Stream:
        """The request, begun: a stream that can be iterated over, blocking or async, and that must be closed."""
        made = self._submission(prompt, params or SamplingParams())
        return self.loop.submit(*made, deltas=deltas)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_variables: Any
    ) -> RequestOutput:
        """The answer to a conversation, through the model's chat template."""
        return self.generate([self._encode_chat(messages, template_variables)], params)[0]

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_variables: Any
    ) -> Iterator[Delta]:
        """The answer to a conversation as it comes."""
        return self.stream(self._encode_chat(messages, template_variables), params)

    def astream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **template_variables: Any
    ) -> AsyncIterator[Delta]:
        """The answer to a conversation as it comes, in an event loop."""
        return self.astream(self._encode_chat(messages, template_variables), params)

    def __repr__(self) -> str:
        experts = (
            f", {len(self.expert_names)} experts: {', '.join(self.expert_names)}" if self.expert_names else ""
        )
        return f"<LLM {self.label}, {self.config.model_type}{experts}>"

    def _encode_chat(self, messages: Sequence[Message], template_variables: dict[str, Any]) -> list[int]:
        """The conversation as ids. Raises RequestError for one without a message: a template may make text of nothing."""
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        return self.tokenizer.encode_chat(messages, **template_variables)

    # ---- experts -------------------------------------------------------------------------------------------

    def only(self, expert: str | int | None) -> None:
        """Send every token of the requests that come from now on to one expert, by name or number; None gives the choice
        back to the routers. What is running goes on as it was, and so does what asks for experts itself.

        Raises RequestError for a dense model, or an expert that is not there.
        """
        self._only = None if expert is None else self.expert_number(expert)

    def expert_number(self, expert: str | int) -> int:
        """The number of an expert, by name or number. Raises RequestError for one that is not there."""
        return expert_number(self.expert_names, expert)

    # ---- the engine's side ---------------------------------------------------------------------------------

    def _submission(self, prompt: str | Sequence[int], params: SamplingParams) -> Submission:
        """What the loop takes: ids, params with the expert that `only` named, and the text."""
        if self._only is not None and params.only_experts is None:
            params = replace(params, only_experts=(self._only,))
        if not isinstance(prompt, str):
            return prompt, params, None
        # a text of nothing is refused even where the tokenizer puts a bos before it
        return self.tokenizer.encode_prompt(prompt) if prompt else [], params, prompt

    def _finish(
        self, streams: Sequence[Stream], params: Sequence[SamplingParams], progress: bool
    ) -> list[RequestOutput]:
        """All that these requests give, once they are done."""
        from rich.progress import Progress

        outputs = []
        with Progress(disable=not progress) as bar:
            task = bar.add_task("answers", total=sum(own.n for own in params))
            for stream, own in zip(streams, params, strict=True):
                outputs.append(stream.output())
                bar.advance(task, own.n)
        return outputs


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise RequestError(
            f"params: found {len(params)} for {prompts} prompts; give one for all, or one each"
        )
    return list(params)


@contextmanager
def _ended(begun: Begun | None) -> Iterator[None]:
    """After the block nothing that was begun goes on."""
    try:
        yield
    finally:
        if begun is not None:
            begun.stop()
