"""The application: paths and what answers them, inside the layers that guard it.

    app = Application(names, access, limits)
    app.ready(llm)                              # from then on, everything is answered
    uvicorn.run(app.asgi)

From the outside in: ids and the log, Host, Origin and keys, limits on bodies, then the paths. /health and /metrics touch
neither the engine's thread nor a worker, so that they answer whatever else goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from octad.errors import OctadError
from octad.serve import protocol
from octad.serve.access_log import Logged
from octad.serve.chat_completions import chat_completions
from octad.serve.completions import completions
from octad.serve.generation import Generator
from octad.serve.lifecycle import ServerState
from octad.serve.limits import Limited, Limits, Queue
from octad.serve.listing import ModelNames, detokenize, embeddings, experts, tokenize
from octad.serve.messages import count_tokens, messages
from octad.serve.metrics import Metrics
from octad.serve.page import HEADERS, Asset, assets
from octad.serve.replies import ApiError, error_response, json_response
from octad.serve.responses import responses
from octad.serve.security import Access, Guarded

if TYPE_CHECKING:
    from octad.engine.llm import LLM

Answer = Callable[[Request], Awaitable[Response]]
MAX_QUEUE = 128


class Application:
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
        self.names, self.limits = names, limits or Limits()
        self.state, self.max_queue, self.timeout = ServerState(), max_queue, timeout
        self.metrics = Metrics(names.names[0])
        self.made: Mapping[str, Any] | None = None
        self._generator: Generator | None = None
        self._page = assets()
        self.api = self._routes()
        counted: ASGIApp = _Counted(self.api, self.state)
        self.asgi: ASGIApp = Logged(Guarded(Limited(counted, self.limits), access or Access()))

    def ready(self, llm: LLM, made: Mapping[str, Any] | None = None) -> None:
        """The model is there. `made`: what make_up tells of it, for /v1/experts."""
        llm.tokenizer.label = self.names.names[0]  # errors tell no paths
        queue = Queue(llm.engine.config.max_num_seqs + self.max_queue)
        self.metrics.watch(llm.engine)
        self.made, self._generator = made, Generator(llm, queue, self.metrics, self.timeout)
        self.state.status, self.state.stage, self.state.progress = "ready", "ready", 1.0

    @property
    def generator(self) -> Generator:
        """Raises ApiError 503 while there is none, or while the server stops."""
        self.state.check()
        assert self._generator is not None
        return self._generator

    # ---- paths ---------------------------------------------------------------------------------------------

    def _routes(self) -> FastAPI:
        api = FastAPI(title="octad", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
        api.add_exception_handler(HTTPException, _http_error)
        api.add_exception_handler(ApiError, _told_error)
        api.add_exception_handler(OctadError, _told_error)
        for path, model, answer in (
            ("/v1/chat/completions", protocol.ChatRequest, chat_completions),
            ("/v1/completions", protocol.CompletionRequest, completions),
            ("/v1/responses", protocol.ResponsesRequest, responses),
            ("/v1/messages", protocol.MessagesRequest, messages),
            ("/v1/embeddings", protocol.EmbeddingRequest, embeddings),
            ("/tokenize", protocol.TokenizeRequest, tokenize),
            ("/detokenize", protocol.DetokenizeRequest, detokenize),
        ):
            self._post(api, path, model, self._with_names(answer))
        self._post(api, "/v1/messages/count_tokens", protocol.MessagesRequest, self._count_tokens)
        for path, read in (
            ("/v1/models", self._models),
            ("/v1/models/{name:path}", self._model),
            ("/v1/experts", self._experts),
            ("/health", self._health),
            ("/metrics", self._metrics),
            ("/docs", self._docs),
            ("/", self._index),
            ("/page/{name:path}", self._asset),
        ):
            shown = path.startswith("/v1") or path in ("/health", "/metrics")
            api.add_api_route(path, read, methods=["GET"], include_in_schema=shown, response_model=None)
            api.add_api_route(path, read, methods=["HEAD"], include_in_schema=False, response_model=None)
        return api

    def _post(self, api: FastAPI, path: str, model: type[protocol.Wire], answer: Answer) -> None:
        extra = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(model)}}}
        }
        api.add_api_route(path, answer, methods=["POST"], openapi_extra=extra, response_model=None, name=path)

    def _with_names(self, answer: Callable[[Request, Generator, ModelNames], Awaitable[Response]]) -> Answer:
        async def endpoint(request: Request) -> Response:
            return await answer(request, self.generator, self.names)

        return endpoint

    async def _count_tokens(self, request: Request) -> Response:
        return await count_tokens(request, self.generator)

    async def _models(self, request: Request) -> Response:
        llm = self._generator.llm if self._generator else None
        return json_response(self.names.list(llm))

    async def _model(self, request: Request) -> Response:
        name = self.names.of(request.path_params["name"])
        return json_response(self.names.entry(name, self._generator.llm if self._generator else None))

    async def _experts(self, request: Request) -> Response:
        return json_response(experts(self.generator.llm, self.made))

    async def _health(self, request: Request) -> Response:
        status, about = self.state.health()
        return json_response(about, status, {"Cache-Control": "no-store"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _docs(self, request: Request) -> Response:
        paths = "".join(f"<li><code>{path}</code></li>" for path in self.api.openapi()["paths"])
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>octad: the API</title><h1>octad: the API</h1>'
            f'<p>The schema: <a href="openapi.json">openapi.json</a>.</p><ul>{paths}</ul></html>'
        )
        return Response(page, headers=dict(HEADERS), media_type="text/html; charset=utf-8")

    async def _index(self, request: Request) -> Response:
        return _asset_response(request, self._page["index.html"])

    async def _asset(self, request: Request) -> Response:
        found = self._page.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return _asset_response(request, found)


def _inlined(model: type[protocol.Wire]) -> dict[str, Any]:
    """A model's JSON schema without references, which OpenAPI would look for elsewhere."""
    schema = model.model_json_schema()
    known = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(known[value["$ref"].rpartition("/")[2]])
            return {key: inline(item) for key, item in value.items()}
        return [inline(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = inline(schema)
    return found


def _asset_response(request: Request, asset: Asset) -> Response:
    headers = dict(HEADERS) | {"ETag": asset.etag}
    if request.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    path = ascii(request.url.path)[:200]
    told = {
        404: f"there is nothing at {path}",
        405: f"{path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return error_response(ApiError(error.status_code, told, code=code, headers=error.headers))


async def _told_error(request: Request, error: Exception) -> Response:
    return error_response(error)


class _Counted:
    """Counts the requests that are being answered, which a server that stops waits for."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        self.state.active += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.state.active -= 1
