"""What the server tells of itself and its model: names, experts, tokens, embeddings.

    models(names, llm); experts(llm, make_up); await tokenize(request, generator); await embeddings(request, generator)

Forms: OpenAI's for models and embeddings, vLLM's for tokenize and detokenize. /v1/experts is octad's own: who is in the
mixture and what it was made of, without a word on where anything lies on this machine.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from starlette.requests import Request
from starlette.responses import Response

from octad.engine.detokenize import token_text
from octad.serve.event_stream import unless_gone
from octad.serve.limits import read_body
from octad.serve.protocol import DetokenizeRequest, EmbeddingRequest, TokenizeRequest, check_choice, parse
from octad.serve.replies import ApiError, encoded, json_response
from octad.serve.sampling_options import template_variables
from octad.serve.tool_calls import Toolbox

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.serve.generation import Generator


@dataclass(frozen=True)
class ModelNames:
    """The names that the model answers to; the first is the one it is listed by."""

    names: tuple[str, ...]
    created: int = 0

    @classmethod
    def now(cls, names: Sequence[str]) -> ModelNames:
        """With this moment as the time that the list tells."""
        return cls(tuple(names), int(time.time()))

    def of(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for one that is not here."""
        if asked in (None, ""):
            return self.names[0]
        if asked not in self.names:
            raise ApiError(
                404,
                f"the model {ascii(asked)[:200]} does not exist here; there is {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return str(asked)

    def entry(self, name: str, llm: LLM | None) -> dict[str, Any]:
        """A model of the list."""
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "octad", "root": name}
        theirs = {"type": "model", "display_name": name, "created_at": _iso(self.created)}
        return about | theirs | {"max_model_len": llm.engine.max_model_len if llm else None}

    def list(self, llm: LLM | None) -> dict[str, Any]:
        """GET /v1/models, for the clients of OpenAI and of Anthropic."""
        ends = {"first_id": self.names[0], "last_id": self.names[-1], "has_more": False}
        return {"object": "list", "data": [self.entry(name, llm) for name in self.names]} | ends


def _iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def experts(llm: LLM, made: Mapping[str, Any] | None) -> dict[str, Any]:
    """GET /v1/experts: who is in the mixture, and what it was made of (octad.serve.make_up)."""
    entries = (made or {}).get("experts") or []
    data = []
    for index, name in enumerate(llm.expert_names):
        record = entries[index] if index < len(entries) and isinstance(entries[index], Mapping) else {}
        domain = record.get("domain")
        data.append({"index": index, "name": name} | ({"domain": str(domain)} if domain else {}))
    config = llm.config
    return {
        "object": "list",
        "data": data,
        "layers": config.num_hidden_layers,
        "top_k": config.num_experts_per_tok if config.num_experts else 0,
        "make_up": made,
    }


async def tokenize(request: Request, generator: Generator, names: ModelNames) -> Response:
    """POST /tokenize, of a prompt or of messages."""
    asked = parse(TokenizeRequest, await read_body(request))
    names.of(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError(400, "prompt: give either a prompt or messages", param="prompt")
    tokenizer = generator.llm.tokenizer

    def work() -> list[int]:
        """Its ids, on the engine's thread pool: templates and tokenizers take their time."""
        if asked.prompt is not None:
            special = asked.add_special_tokens is not False
            return tokenizer.encode(asked.prompt, add_special_tokens=special, parse_special=False)
        if not asked.messages:
            raise ApiError(400, "messages: the conversation is empty", param="messages")
        return generator.encode(
            asked.messages, Toolbox.of(asked.tools, None, None), template_variables(asked)
        )

    def told() -> bytes:
        ids = work()
        strings = [token_text(tokenizer, token) for token in ids] if asked.return_token_strs else None
        about = {"count": len(ids), "max_model_len": generator.llm.engine.max_model_len}
        return encoded(about | {"tokens": ids, "token_strs": strings})

    found = await unless_gone(request, generator.aside(told))
    return Response(found, media_type="application/json")


async def detokenize(request: Request, generator: Generator, names: ModelNames) -> Response:
    """POST /detokenize."""
    asked = parse(DetokenizeRequest, await read_body(request))
    names.of(asked.model)
    most = generator.llm.config.vocab_size - 1

    def work() -> bytes:
        if asked.tokens and not 0 <= min(asked.tokens) <= max(asked.tokens) <= most:
            raise ApiError(400, f"tokens: ids should lie from 0 to {most}", param="tokens")
        # a batch is decoded without the interpreter's lock
        (text,) = generator.llm.tokenizer.core.decode_batch([asked.tokens], skip_special_tokens=False)
        return encoded({"prompt": text})

    found = await unless_gone(request, generator.aside(work))
    return Response(found, media_type="application/json")


async def embeddings(request: Request, generator: Generator, names: ModelNames) -> Response:
    """POST /v1/embeddings: the mean of the last hidden states, of length 1."""
    asked = parse(EmbeddingRequest, await read_body(request))
    model = names.of(asked.model)
    check_choice("encoding_format", asked.encoding_format or "float", ("float", "base64"))
    width = generator.llm.config.hidden_size
    if asked.dimensions not in (None, width):
        raise ApiError(400, f"dimensions: found {asked.dimensions}, allowed: {width}", param="dimensions")
    given: Any = asked.input
    one = isinstance(given, str) or (given and isinstance(given[0], int))
    batch = [given] if one else list(given)
    if not batch or len(batch) > 2048 or any(not text for text in batch):
        raise ApiError(400, "input: should be 1 to 2048 texts, none of them empty", param="input")

    async def work() -> tuple[list[torch.Tensor], int]:
        """A vector of each text, one after another, and all tokens; one place in the queue for the whole request."""
        vectors, tokens = [], 0
        with generator.queue.place():
            for text in batch:
                vector, count = await generator.aside(partial(embed, generator.llm, text))
                vectors.append(vector)
                tokens += count
        return vectors, tokens

    vectors, tokens = await unless_gone(request, work())
    coded = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _base64(v) if coded else v.tolist()}
        for i, v in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


def embed(llm: LLM, text: str | Sequence[int]) -> tuple[torch.Tensor, int]:
    """The vector of one text, [D] in float32, and its tokens; run by the engine's thread between two steps."""
    ids = llm.tokenizer.encode_prompt(text) if isinstance(text, str) else list(text)
    most, vocabulary = llm.engine.max_model_len, llm.config.vocab_size
    if len(ids) > most:
        raise ApiError(
            400,
            f"input: the text has {len(ids)} tokens, the context {most}; shorten it",
            param="input",
            code="context_length_exceeded",
        )
    if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
        raise ApiError(400, f"input: ids should lie from 0 to {vocabulary - 1}", param="input")

    def work() -> torch.Tensor:
        """The mean over positions, of length 1 [D]; on the engine's own thread, between two steps."""
        with torch.inference_mode():
            device = llm.model.model.norm.weight.device
            hidden = llm.model.model(torch.tensor([ids], device=device))[0].float().mean(0).cpu()
            return torch.nn.functional.normalize(hidden, dim=0)

    return llm.loop.call(work), len(ids)


def _base64(vector: torch.Tensor) -> str:
    return base64.b64encode(vector.numpy().astype(np.float32).tobytes()).decode()
