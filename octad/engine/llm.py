"""LLM: a model that answers, in Python.

    llm = LLM("mixture/")
    llm.generate(["Once upon", "def f("], SamplingParams(max_tokens=32))[0].outputs[0].text
    for delta in llm.stream_chat([{"role": "user", "content": "Hi"}]): print(delta.text, end="")

Opens what `octad.checkpoint.load` opens, puts an Engine around it and speaks in text. The checkpoint's generation_config
is not applied: what SamplingParams says is what is sampled. Several streams can be open at once; each step of one moves
them all on.

Not thread-safe: one thread calls it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octad.dist import compute_dtype, keep_freed_memory
from octad.engine.engine import Engine, EngineConfig
from octad.engine.outputs import Delta, RequestOutput
from octad.engine.params import SamplingParams
from octad.errors import CheckpointError, RequestError
from octad.model.moe import FixedRouter
from octad.model.observe import mixtures

if TYPE_CHECKING:
    from octad.model.config import ModelConfig
    from octad.model.transformer import Transformer
    from octad.text.tokenizer import Message, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LLM:
    """A model opened from disk, or given as (model, tokenizer), with an engine around it.

    dtype: "auto" (what the hardware is fast at), "float32", "bfloat16" or "float16". device: "auto" (a GPU where there is
    one), "cpu", "cuda", "cuda:1". quantize: None, "int8" or "int4". native: use compiled kernels where they are there.
    Fields of EngineConfig can be given by name. A given model keeps its dtype and device, and is changed in place.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    engine: Engine
    expert_names: list[str]

    def __init__(
        self,
        model: str | Path | tuple[Transformer, Tokenizer],
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str | None = None,
        native: bool = True,
        engine: EngineConfig | None = None,
        **engine_options: Any,
    ) -> None:
        from octad.fast.optimize import optimize

        keep_freed_memory()
        settings = replace(engine or EngineConfig(), **engine_options)
        directory = None
        if isinstance(model, tuple):
            transformer, self.tokenizer = model
        else:
            transformer, self.tokenizer, directory = _load(model, dtype, device)
        attention = optimize(transformer, quantize=quantize, native=native)
        self.config, self.model = transformer.config, transformer
        self.expert_names = _expert_names(directory, self.config.num_experts)
        self.engine = Engine(transformer, self.tokenizer, settings, attention)
        self._routers = {layer: mlp.gate for layer, mlp in mixtures(transformer).items()}
        self._ids = count(1)
        self._inboxes: dict[str, deque[Delta]] = {}

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
        ids: list[str] = []
        try:
            for prompt, own in zip(batch, each, strict=True):
                ids.append(self._add(prompt, own))
            self._finish(ids, progress)
            return [self.engine.output(request_id) for request_id in ids]
        finally:
            for request_id in ids:
                self.engine.abort(request_id)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer(s) as they come. The request begins with the first `next` and closing the iterator aborts it."""
        request_id = self._add(prompt, params or SamplingParams())
        inbox = self._inboxes[request_id] = deque()
        try:
            unfinished = (params or SamplingParams()).n
            while unfinished:
                while not inbox:
                    self._step()
                delta = inbox.popleft()
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            del self._inboxes[request_id]
            self.engine.abort(request_id)

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

    def _encode_chat(self, messages: Sequence[Message], template_variables: dict[str, Any]) -> list[int]:
        """The conversation as ids. Raises RequestError for one without a message: a template may make text of nothing."""
        if not messages:
            raise RequestError("the conversation is empty; give at least one message")
        return self.tokenizer.encode_chat(messages, **template_variables)

    # ---- experts -------------------------------------------------------------------------------------------

    def only(self, expert: str | int | None) -> None:
        """Send every token to one expert, by name or number; None gives the routers back. Drops the prefix cache.

        Raises RequestError for a dense model, an expert that is not there, or while requests are running.
        """
        if self.engine.has_unfinished():
            raise RequestError(
                "the experts cannot be changed while requests are running; finish or abort them"
            )
        number = None if expert is None else self._expert(expert)
        for layer, mlp in mixtures(self.model).items():
            mlp.gate = self._routers[layer] if number is None else FixedRouter([number])
        self.engine.reset_prefix_cache()

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

    def _add(self, prompt: str | Sequence[int], params: SamplingParams) -> str:
        request_id = f"llm-{next(self._ids)}"
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt)
            # a text of nothing is refused even where the tokenizer puts a bos before it
            self.engine.add_request(request_id, ids if prompt else [], params, prompt)
        elif isinstance(prompt, int):
            raise RequestError(
                "prompts: found a list of ids; give a list of prompts, [[1, 2, 3]] for one of ids"
            )
        else:
            self.engine.add_request(request_id, prompt, params)
        return request_id

    def _step(self) -> list[Delta]:
        """One step of the engine; open streams get what is theirs."""
        deltas = self.engine.step()
        for delta in deltas:
            if delta.request_id in self._inboxes:
                self._inboxes[delta.request_id].append(delta)
        return deltas

    def _finish(self, ids: Sequence[str], progress: bool) -> None:
        """Run until all these requests are done."""
        from rich.progress import Progress

        open_answers = sum(self.engine.requests[request_id].params.n for request_id in ids)
        with Progress(disable=not progress) as bar:
            task = bar.add_task("answers", total=open_answers)
            mine = set(ids)
            while open_answers:
                done = sum(d.finish_reason is not None and d.request_id in mine for d in self._step())
                open_answers -= done
                bar.advance(task, done)


def _for_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise RequestError(
            f"params: found {len(params)} for {prompts} prompts; give one for all, or one each"
        )
    return list(params)


def _load(model: str | Path, dtype: str, device: str) -> tuple[Transformer, Tokenizer, Path | None]:
    """The model in the wanted dtype on the wanted device, its tokenizer, and where its side files lie."""
    from octad.checkpoint.load import load_model, load_tokenizer, open_source
    from octad.checkpoint.quantized import QuantizedSource
    from octad.fast.saved import load_quantized

    if dtype not in ("auto", *DTYPES):
        raise RequestError(f"dtype: found {dtype!r}, allowed: auto, {', '.join(DTYPES)}")
    source = open_source(model, quantised=True)
    place = _device(device)
    kind = compute_dtype(place) if dtype == "auto" else DTYPES[dtype]
    if isinstance(source, QuantizedSource):
        return load_quantized(source, kind, place), load_tokenizer(source), source.directory
    return load_model(source, kind, place), load_tokenizer(source), source.directory


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        raise RequestError(
            f"device: found {name!r}, which this machine or this torch does not have"
        ) from error
    return device


def _expert_names(directory: Path | None, experts: int) -> list[str]:
    """The names in octad.json where octad made the mixture, else "expert 0", ...; [] for a dense model."""
    path = directory / "octad.json" if directory else None
    if not experts or path is None or not path.is_file():
        return [f"expert {number}" for number in range(experts)]
    try:
        names = [str(entry["name"]) for entry in json.loads(path.read_text(encoding="utf-8"))["experts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error!r}); combine again, or remove it") from None
    if len(names) != experts:
        raise CheckpointError(f"{path}: names {len(names)} experts, the weights have {experts}; remove it")
    return names
