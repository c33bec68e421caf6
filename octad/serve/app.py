"""The application: octad's own engine behind the APIs of OpenAI and Anthropic.

    app = Application(names, access, limits)
    app.ready(llm)                              # from then on, everything is answered
    uvicorn.run(app.asgi)

What guards it, the page and the health are in octad.serve.front; a server in front of somebody else's engine is
octad.serve.backend_app.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from octad.serve import protocol
from octad.serve.chat_completions import chat_completions
from octad.serve.completions import completions
from octad.serve.front import Answer, Front
from octad.serve.generation import Generator
from octad.serve.limits import Limits, Queue
from octad.serve.listing import ModelNames, detokenize, embeddings, experts, tokenize
from octad.serve.messages import count_tokens, messages
from octad.serve.metrics import Metrics
from octad.serve.replies import json_response
from octad.serve.responses import responses
from octad.serve.security import Access

if TYPE_CHECKING:
    from octad.engine.llm import LLM

MAX_QUEUE = 128
log = logging.getLogger("octad.serve")


class Application(Front):
    """One model behind the API. `asgi` is what a server runs."""

    def __init__(
        self,
        names: ModelNames,
        access: Access | None = None,
        limits: Limits | None = None,
        *,
        max_queue: int = MAX_QUEUE,
        timeout: float | None = None,
    ) -> None:
        self.names, self.max_queue, self.timeout = names, max_queue, timeout
        self.metrics = Metrics(names.names[0])
        self.made: Mapping[str, Any] | None = None
        self._generator: Generator | None = None
        super().__init__(access, limits)

    def ready(self, llm: LLM, made: Mapping[str, Any] | None = None) -> None:
        """The model is there. `made`: what make_up tells of it, for /v1/experts."""
        llm.tokenizer.label = self.names.names[0]  # errors tell no paths
        queue = Queue(llm.engine.config.max_num_seqs + self.max_queue)
        self.metrics.watch(llm.engine)
        generator = Generator(llm, queue, self.metrics, self.timeout)
        if "tools" in (llm.tokenizer.chat_template or "") and not generator.form.native:
            log.warning(
                "the chat template teaches calls in a form that is not known; tools are told as <tool_call> JSON"
            )
        self.made, self._generator = made, generator
        self.state.become("ready", "ready", 1.0)

    @property
    def generator(self) -> Generator:
        """Raises ApiError 503 while there is none, or while the server stops."""
        self.state.check()
        assert self._generator is not None
        return self._generator

    # ---- paths ---------------------------------------------------------------------------------------------

    def add_paths(self) -> None:
        """What OpenAI's, Anthropic's and vLLM's clients ask for."""
        for path, model, answer in (
            ("/v1/chat/completions", protocol.ChatRequest, chat_completions),
            ("/v1/completions", protocol.CompletionRequest, completions),
            ("/v1/responses", protocol.ResponsesRequest, responses),
            ("/v1/messages", protocol.MessagesRequest, messages),
            ("/v1/embeddings", protocol.EmbeddingRequest, embeddings),
            ("/tokenize", protocol.TokenizeRequest, tokenize),
            ("/detokenize", protocol.DetokenizeRequest, detokenize),
        ):
            self.post(path, model, self._with_names(answer))
        self.post("/v1/messages/count_tokens", protocol.MessagesRequest, self._count_tokens)
        for path, read in (
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._model),
            ("/v1/experts", self._experts),
            ("/metrics", self._metrics),
        ):
            self.get(path, read, shown=True)

    def _with_names(self, answer: Callable[[Request, Generator, ModelNames], Awaitable[Response]]) -> Answer:
        async def endpoint(request: Request) -> Response:
            return await answer(request, self.generator, self.names)

        return endpoint

    async def _count_tokens(self, request: Request) -> Response:
        return await count_tokens(request, self.generator, self.names)

    async def _models(self, request: Request) -> Response:
        llm = self._generator.llm if self._generator else None
        return json_response(self.names.list(llm))

    async def _model(self, request: Request) -> Response:
        if not request.path_params["name"]:
            return await self._models(request)
        name = self.names.of(request.path_params["name"])
        return json_response(self.names.entry(name, self._generator.llm if self._generator else None))

    async def _experts(self, request: Request) -> Response:
        return json_response(experts(self.generator.llm, self.made))

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
