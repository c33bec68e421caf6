"""What every server of octad's has: the page, the health, the list of paths, and the layers that guard all of it.

    class Application(Front): def add_paths(self): self.get("/v1/models", ...); self.post(...)
    uvicorn.run(app.asgi)

From the outside in: ids and the log, hearing out whoever is refused, Host, Origin and keys, limits on bodies, the paths.
/health touches neither an engine's thread nor a worker nor another server, so that it answers whatever else goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from octad.errors import OctadError
from octad.serve.access_log import Logged
from octad.serve.lifecycle import ServerState
from octad.serve.limits import Heard, Limited, Limits
from octad.serve.page import HEADERS, Asset, assets
from octad.serve.protocol import Wire
from octad.serve.replies import ApiError, error_response, json_response
from octad.serve.security import Access, Guarded

Answer = Callable[[Request], Awaitable[Response]]
_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
    "required": ["message", "type", "param", "code"],
}
_BODY = {"type": "object", "properties": {"error": _ERROR}, "required": ["error"]}
FAILED: dict[str, Any] = {"description": "An error", "content": {"application/json": {"schema": _BODY}}}
TEXT: dict[str, Any] = {"description": "Prometheus' text", "content": {"text/plain": {}}}
STREAMED: dict[str, Any] = {
    "description": "The answer, or with `stream` its pieces",
    "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
}


class Front:
    """The base: `asgi` is what a server runs. A subclass adds its paths in `add_paths`."""

    def __init__(self, access: Access | None = None, limits: Limits | None = None) -> None:
        self.limits, self.access = limits or Limits(), access or Access()
        self.state = ServerState()
        self._page = assets()
        self.api = FastAPI(
            title="octad", docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False
        )
        self.api.add_exception_handler(HTTPException, _http_error)
        self.api.add_exception_handler(ApiError, _told_error)
        self.api.add_exception_handler(OctadError, _told_error)
        self.api.add_exception_handler(Exception, _told_error)  # Logged hears of it, too
        self.get("/health", self._health, shown=True)
        self.get("/docs", self._docs)
        self.get("/", self._index)
        self.get("/page/{name:path}", self._asset)
        self.add_paths()
        counted: ASGIApp = _Counted(self.api, self.state)
        guarded = Guarded(Limited(counted, self.limits), self.access)
        self.asgi: ASGIApp = Logged(Heard(guarded, self.limits))

    def add_paths(self) -> None:
        """The paths of the subclass."""
        raise NotImplementedError

    def get(self, path: str, answer: Answer, *, shown: bool = False) -> None:
        """Add a path for GET and HEAD; `shown` in the schema."""
        self.api.add_api_route(
            path,
            answer,
            methods=["GET"],
            include_in_schema=shown,
            response_model=None,
            responses={"default": FAILED} | ({200: TEXT} if path == "/metrics" else {}),
        )
        self.api.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False, response_model=None)

    def post(self, path: str, model: type[Wire], answer: Answer) -> None:
        """Add a path for POST, whose body the schema tells by `model`."""
        extra = {
            "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(model)}}}
        }
        told = {"default": FAILED} | ({200: STREAMED} if "stream" in model.model_fields else {})
        self.api.add_api_route(
            path,
            answer,
            methods=["POST"],
            openapi_extra=extra,
            response_model=None,
            name=path,
            responses=told,
        )

    # ---- paths ---------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        status, about = self.state.health()
        return json_response(about, status, {"Cache-Control": "no-store"})

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


def _inlined(model: type[Wire]) -> dict[str, Any]:
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
    return error_response(
        ApiError(error.status_code, told, code=code, headers=error.headers), request.url.path
    )


async def _told_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.url.path)


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
