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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octad.checkpoint.load import load_tokenizer, open_source
from octad.dist import compute_dtype, keep_freed_memory
from octad.engine.engine import Engine, EngineConfig
from octad.engine.loop import EngineLoop, Stream, Submission
from octad.engine.outputs import Delta, RequestOutput
from octad.engine.params import SamplingParams, own_sampling
from octad.errors import CheckpointError, RequestError
from octad.fast.beginning import Begun, begin, may_begin
from octad.fast.loading import dtype_note, open_fast
from octad.fast.optimize import optimize
from octad.guard import read_object

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.fast.expert_store import ExpertStore
    from octad.model.config import ModelConfig
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Message, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        settings = replace(engine or EngineConfig(), **engine_options)
        how: dict[str, Any] = {"quantize": quantize, "native": native}
        directory = None
        if isinstance(model, tuple):
            self.model, self.tokenizer = model
            self.label = "(a model in memory)"
            attention = optimize(self.model, **how)
            if memory is not None:
                raise RequestError("memory: a model that is loaded is in memory; give its directory")
        else:
            self.label = os.fspath(model)
            if begun is None and memory is None and native and may_begin(dtype, device):
                begun = begin(model, quantize)
            try:
                source, kind, place = _open(self.label, dtype, device)
                self.tokenizer, directory = load_tokenizer(source), source.directory
                self.dtype_note = dtype_note(source, kind) if dtype == "auto" else None
                how |= {"memory": None if memory is None else _budget(memory), "begun": begun}
                self.model, attention = open_fast(source, kind, place, **how)
            finally:
                if begun is not None:
                    begun.stop()
        self.config = self.model.config
        self.expert_names = expert_names(directory, self.config.num_experts)
        self.own_sampling = own_sampling(self.tokenizer.generation)
        self.engine = Engine(self.model, self.tokenizer, settings, attention)
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
        return self._expert(expert)

    def _expert(self, expert: str | int) -> int:
        names = self.expert_names
        if not names:
            raise RequestError(f"expert {expert!r}: this model is dense, it has no experts")
        if isinstance(expert, int) and 0 <= expert < len(names):
            return expert
        if expert in names:
            return names.index(expert)
        raise RequestError(f"expert {expert!r}: there is none; there are {', '.join(names)}")

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


def _budget(memory: int | str) -> int:
    from octad.fast.offloaded import memory_bytes

    return memory_bytes(memory)


def _open(model: str, dtype: str, device: str) -> tuple[TensorSource, torch.dtype, torch.device]:
    """What lies on disk, the dtype of the activations and the device."""
    if dtype not in ("auto", *DTYPES):
        raise RequestError(f"dtype: found {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    source, place = open_source(model, quantised=True), _device(device)
    return source, compute_dtype(place) if dtype == "auto" else DTYPES[dtype], place


def _device(name: str) -> torch.device:
    """Raises RequestError for a device that is not there, and for one that octad has no path for (mps, xpu, meta)."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        own = "; on Apple's processors its kernels for the CPU know NEON" * (kind == "mps")
        raise RequestError(
            f"device: found {name!r}, allowed: auto, cpu, cuda: octad has no path of its own for others{own}"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise RequestError(
            f"device: found {name!r}, which this machine or this torch does not have"
        ) from error
    return device


def expert_names(directory: Path | None, experts: int) -> list[str]:
    """The names in octad.json where octad made the mixture, else "expert 0", ...; [] for a dense model."""
    path = directory / "octad.json" if directory else None
    if not experts or path is None or not path.is_file():
        return [f"expert {number}" for number in range(experts)]
    try:
        names = [str(entry["name"]) for entry in read_object(path)["experts"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); combine again, or remove it") from None
    if len(names) != experts:
        raise CheckpointError(f"{path}: names {len(names)} experts, the weights have {experts}; remove it")
    return names
