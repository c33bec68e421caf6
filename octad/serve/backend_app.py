"""The application in front of another server: the same page, guards and health, and its API passed through.

    app = BackendApplication(Backend("http://gpu:8000"))
    app.backend.watch(app.state)
    uvicorn.run(app.asgi)

What comes is passed on as it is, streams piece by piece; a client that leaves closes the connection to the backend, which
then stops working for it. Added to chats and completions are `speakers`, from what vLLM and SGLang tell of their routing
(octad.serve.foreign_speakers). What the backend cannot do (masks, speakers without routing) is a 400: engines ignore
fields that they do not know.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

import httpx2
from starlette.requests import Request
from starlette.responses import Response

from octad.serve.backend import Backend, Routing, told
from octad.serve.event_stream import DONE, EventStream, frame, unless_gone
from octad.serve.foreign_speakers import Speaking
from octad.serve.front import Front
from octad.serve.limits import Limits, read_body
from octad.serve.replies import ANTHROPIC, ApiError, json_response
from octad.serve.security import Access

SPOKEN = ("/v1/chat/completions", "/v1/completions")  # where speakers can be asked for
OWN = ("only_experts", "speakers", "return_routed_experts")
METHODS = ["GET", "HEAD", "POST", "DELETE"]


class BackendApplication(Front):
    """`made`: what octad.serve.make_up tells of the mixture that the backend serves, where it is at hand."""

    def __init__(
        self,
        backend: Backend,
        access: Access | None = None,
        limits: Limits | None = None,
        *,
        made: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend, self.made = backend, made
        super().__init__(access, limits)

    @property
    def routing(self) -> Routing:
        """What the backend tells of its routing; raises ApiError 503 while nobody answers."""
        self.state.check()
        return self.backend.routing or Routing()

    def add_paths(self) -> None:
        """Octad's own, and everything else of the backend's API."""
        self.get("/v1/experts", self._experts, shown=True)
        for path in ("/v1/{rest:path}", "/tokenize", "/detokenize", "/metrics"):
            self.api.add_api_route(
                path, self._pass, methods=METHODS, include_in_schema=False, response_model=None
            )

    async def _experts(self, request: Request) -> Response:
        routing = self.routing
        if routing.kind == "octad":
            return await self._pass(request)
        return json_response(
            {
                "object": "list",
                "data": [{"index": i, "name": name} for i, name in enumerate(routing.names)],
                "layers": routing.layers,
                "top_k": routing.top_k,
                "make_up": self.made,
                "masks": False,
                "live": False,
            }
        )

    async def _pass(self, request: Request) -> Response:
        routing = self.routing
        if ".." in request.url.path.split("/"):
            raise ApiError(404, "there is nothing at this path", code="not_found")
        if request.method == "POST" and request.url.path in SPOKEN and routing.kind != "octad":
            asked = await read_body(request)
            if any(asked.get(name) not in (None, False, []) for name in OWN):
                _check(asked, routing)
                return await self._spoken(request, asked, routing)
        return await self._plain(request, await request.body())

    async def _plain(self, request: Request, body: bytes) -> Response:
        response = await unless_gone(request, self._ask(request, body))
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            anthropic = request.url.path.startswith(ANTHROPIC)
            return EventStream(self._limited(_frames(response), anthropic=anthropic), _nothing)
        content = await unless_gone(request, self._in_time(_whole(response)))
        return Response(content, response.status_code, media_type=response.headers.get("content-type"))

    async def _spoken(self, request: Request, asked: dict[str, Any], routing: Routing) -> Response:
        """With speakers, found from what the backend tells of its routing."""
        speaking = Speaking(asked, routing, chat=request.url.path == SPOKEN[0])
        response = await unless_gone(request, self._ask(request, json.dumps(speaking.body).encode()))
        if not asked.get("stream"):
            found = json.loads(await unless_gone(request, self._in_time(_whole(response))))
            return json_response(speaking.whole(found))

        async def routes(prompt: list[int], start: int) -> dict[str, Any]:
            """A text's routing, by reading it again, which a prefix cache makes a moment."""
            body = {
                "model": asked.get("model"),
                "prompt": prompt,
                "max_tokens": 1,
                "routed_experts_prompt_start": start,
            }
            again = await self.backend.send(
                "POST", SPOKEN[1], json.dumps(body).encode(), request.headers, request.scope["request_id"]
            )
            found: dict[str, Any] = json.loads(await _whole(again))
            return found

        return EventStream(self._limited(speaking.stream(_frames(response), routes)), _nothing)

    # ---- to the backend ------------------------------------------------------------------------------------

    async def _ask(self, request: Request, body: bytes) -> httpx2.Response:
        path = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1").partition("?")[0]
        if query := request.scope.get("query_string", b"").decode("latin-1"):
            path += f"?{query}"
        work = self.backend.send(
            request.method, path, body, request.headers, request.scope.get("request_id", "")
        )
        return await self._in_time(work)  # type: ignore[no-any-return]

    async def _in_time(self, work: Any) -> Any:
        """The result, within the time that an answer may take."""
        try:
            async with asyncio.timeout(self.backend.seconds):
                return await work
        except TimeoutError:
            raise _late(self.backend.seconds) from None

    async def _limited(
        self, frames: AsyncGenerator[bytes], *, anthropic: bool = False
    ) -> AsyncGenerator[bytes]:
        """The frames; trouble in the middle is told as a last one."""
        loop = asyncio.get_running_loop()
        end = None if self.backend.seconds is None else loop.time() + self.backend.seconds
        try:
            while True:
                async with asyncio.timeout_at(end):
                    part = await anext(frames, None)
                if part is None:
                    return
                yield part
        except TimeoutError:
            error = _late(self.backend.seconds)
        except ApiError as found:
            error = found
        finally:
            await frames.aclose()
        yield b"\n\n" + frame(error.body(ANTHROPIC if anthropic else ""), "error" if anthropic else None)
        if not anthropic:
            yield DONE


def _check(asked: Mapping[str, Any], routing: Routing) -> None:
    """Raises ApiError for what the backend cannot do and would ignore."""
    if asked.get("only_experts") is not None:
        raise ApiError(
            400,
            "only_experts: the engine behind this server has no masks; octad's own has",
            param="only_experts",
            code="unsupported_parameter",
        )
    if not routing.foreign:
        name = next(name for name in OWN[1:] if asked.get(name))
        raise ApiError(
            400,
            f"{name}: the backend does not tell which expert speaks",
            param=name,
            code="unsupported_parameter",
        )


def _late(seconds: float | None) -> ApiError:
    return ApiError(504, f"the answer took longer than {seconds or 0:g} s", code="backend_timeout")


async def _whole(response: httpx2.Response) -> bytes:
    try:
        return await response.aread()
    except httpx2.HTTPError as error:
        raise told(error) from None
    finally:
        await response.aclose()


async def _frames(response: httpx2.Response) -> AsyncGenerator[bytes]:
    """The body as it comes. Ending early, for whatever reason, closes the connection, and so the backend's work."""
    try:
        async for part in response.aiter_raw():
            yield part
    except httpx2.HTTPError as error:
        raise told(error) from None
    finally:
        with suppress(httpx2.HTTPError):
            await response.aclose()


def _nothing() -> None:
    """Closing the generator is all."""
