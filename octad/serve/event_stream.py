"""Answers that come in pieces, and clients that leave: both end what the engine does for them.

    return EventStream(frames(), job.close)                  # server-sent events, until the client leaves
    found = await unless_gone(request, work())               # a plain answer; cancels the work when the client leaves

Starlette cancels neither by itself in every case (uvicorn's `send` is silent after a disconnect), so both listen for the
client while they work. A frame is made by hand: `data: JSON`. While nothing comes, a comment keeps the connection alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octad.serve.replies import as_api_error, encoded

Result = TypeVar("Result")
SILENCE = 15.0  # seconds after which a comment is sent
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody is there to read the answer."""


def frame(content: Any, event: str | None = None) -> bytes:
    """One event with JSON in it."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + encoded(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def told_to_the_end(
    chunks: AsyncGenerator[bytes], last: Callable[[], bytes], close: Callable[[], None]
) -> AsyncGenerator[bytes]:
    """Chunks of OpenAI's kind, then `last` and [DONE]; an error underway is told in their place. `close` in any case."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk
        yield last()
    except Exception as error:
        told = as_api_error(error)
        if told.code == "internal_error":
            raise
        yield frame(told.body())
    finally:
        close()
    yield DONE


class EventStream(Response):
    """Sends what the generator yields until it ends or the client leaves; `close` is called in any case."""

    def __init__(self, frames: AsyncGenerator[bytes], close: Callable[[], None]) -> None:
        super().__init__(None, 200, HEADERS, "text/event-stream; charset=utf-8")
        del self.headers["content-length"]
        self.frames, self.close = frames, close
        self._latest = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        others = [asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._keep_alive(send))]
        try:
            await asyncio.wait({sending, others[0]}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.close()
            for task in (*others, sending):
                task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.frames):
            async for body in self.frames:
                self._latest = asyncio.get_running_loop().time()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await asyncio.sleep(SILENCE)
            if asyncio.get_running_loop().time() - self._latest > SILENCE / 2:
                await send({"type": "http.response.body", "body": b": wait\n\n", "more_body": True})


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives. Raises ClientGone, with the work cancelled, where the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
