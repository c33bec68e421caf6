"""Limits that keep one client from harming others: on bodies, on those who send slowly, on time, and on the queue.

    app = Heard(app, Limits())                       # whoever is refused is heard to the end of its body first
    app = Limited(app, Limits())                     # bodies: their size, and when they must have come
    protocol = patient_protocol(Limits())            # connections: when their headers must have come
    with queue.place(): ...                          # requests: 429 once so many are here

uvicorn waits for ever for a header or a body that does not come, so both have a deadline here. A connection that is
closed while its client still sends is a broken one to that client, which then never reads why. JSON is read with the
guard's limits on nesting and numbers, a large one on a worker's thread.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from octad.guard import parse_json
from octad.serve.replies import ApiError, BadBody, encoded, error_response, shown

DISCARDED = 64 << 20  # bytes of a body which are read before a client that is refused is told
LARGE = 1 << 17  # bytes of a body above which it is not read on the event loop
LINGER = 1.0  # seconds in which a client whose headers are too large may read so
REASONS = {
    400: b"Bad Request",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
}


@dataclass(frozen=True)
class Limits:
    """body_bytes; header_seconds and body_seconds until they must be there whole; header_bytes; connections at once."""

    body_bytes: int = 8 << 20
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    header_bytes: int = 64 << 10
    connections: int = 1024


class Heard:
    """Before an error goes back, the rest of the body is read and dropped, within the limits on bodies."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        whole = not length.isdigit() or int(length) > DISCARDED or "expect" in headers  # nothing to wait for
        size = 0

        async def hear() -> Message:
            nonlocal whole, size
            message = await receive()
            size += len(message.get("body", b""))
            whole = whole or not message.get("more_body")
            return message

        async def reply(message: Message) -> None:
            refused = message["type"] == "http.response.start" and message["status"] >= 400
            if refused and message["status"] != 408:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.limits.body_seconds):
                        while not whole and size <= DISCARDED:
                            await hear()
            await send(message)

        await self.app(scope, hear, reply)


class Limited:
    """The application behind a limit on every body."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        error = None
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            error = self._too_large()
        elif "transfer-encoding" in headers and "content-length" in headers:  # how requests are smuggled
            error = ApiError(
                400,
                "content-length: is not for a body in chunks",
                code="invalid_http",
                headers={"Connection": "close"},
            )
        elif headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            error = ApiError(
                415,
                f"content-encoding: found {shown(headers['content-encoding'])}, allowed: identity; send it as it is",
                code="unsupported_content_encoding",
                headers={"Accept-Encoding": "identity"},
            )
        if error is not None:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _too_large(self) -> ApiError:
        most = self.limits.body_bytes
        return ApiError(
            413,
            f"the body is larger than {most} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` with a limit on what comes and on how long it takes."""
        deadline = asyncio.get_running_loop().time() + self.limits.body_seconds
        size, more = 0, True

        async def bounded() -> Message:
            """The next part of the body. Raises ApiError where it is late, or one too many."""
            nonlocal size, more
            if not more:
                return await receive()
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.0))
            except TimeoutError:
                more = False
                raise ApiError(
                    408,
                    f"the body did not come within {self.limits.body_seconds:g} s",
                    code="request_timeout",
                    headers={"Connection": "close"},
                ) from None
            size += len(message.get("body", b""))
            more = bool(message.get("more_body"))
            if size > self.limits.body_bytes:
                more = False
                raise self._too_large()
            return message

        return bounded


async def read_body(request: Request) -> dict[str, Any]:
    """The object in a request's body. Raises ApiError for anything else."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise ApiError(
            415, "content-type: should be application/json; forms are not read", code="unsupported_media_type"
        )
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was whole") from None
    return await asyncio.to_thread(_object, raw) if len(raw) > LARGE else _object(raw)


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise ApiError(400, "the body is empty; send a JSON object", code="invalid_json")
    try:
        found = parse_json(raw, "body", BadBody, prose=True, finite=True)
    except BadBody as error:
        raise ApiError(400, str(error)[:500], code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(
            400, f"body: should be a JSON object, found {type(found).__name__}", code="invalid_json"
        )
    return found


class Queue:
    """How many requests may be here at once; those beyond are told when to come back."""

    def __init__(self, most: int) -> None:
        self.most, self.here = most, 0

    @contextmanager
    def place(self, count: int = 1) -> Iterator[None]:
        """A place for `count` requests while the block runs. Raises ApiError 429 where the queue is full."""
        if self.here and self.here + count > self.most:
            raise ApiError(
                429,
                f"{self.here} requests are here, as many as this server takes; try again",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        self.here += count
        try:
            yield
        finally:
            self.here -= count


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for headers, a limit on connections, and errors in the form of all others."""

    limits = Limits()
    _late: asyncio.TimerHandle | None = None
    _over = False  # what still comes is dropped

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The headers' time begins."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.close()
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Something came: a request that is whole has no deadline any more."""
        if self._over:
            return
        super().data_received(data)
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            self._disarm()
        elif self._late is None and not self.transport.is_closing():
            self._arm()

    def on_response_complete(self) -> None:
        """Where a part of the next request came with the last one, its time begins."""
        super().on_response_complete()
        begun = bool(self.conn.trailing_data[0])
        if begun and self._late is None and not self.transport.is_closing():
            self._arm()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered as any other; uvicorn's advice to install a library would not help."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is waited for."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._late = self.loop.call_later(self.limits.header_seconds, self._give_up)

    def _disarm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        """The headers have not come; whoever is in the middle of an answer is left alone."""
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error as all others do; called where h11's own is being handled."""
        hint = getattr(sys.exception(), "error_status_hint", 400)
        status = hint if hint in REASONS else 400
        told = {431: f"the headers are larger than {self.limits.header_bytes} bytes"}.get(status, msg)
        code = "headers_too_large" if status == 431 else "invalid_http"
        body = encoded(ApiError(status, told, code=code).body())
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with suppress(h11.LocalProtocolError):  # in the middle of an answer
            for event in (
                h11.Response(status_code=status, headers=headers, reason=REASONS[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._over = True
        if status == 431 and self.transport.can_write_eof():
            self.transport.write_eof()
            self.loop.call_later(LINGER, self.transport.close)
        else:
            self.transport.close()


def patient_protocol(limits: Limits) -> type[PatientProtocol]:
    """The protocol with these limits: uvicorn makes one for each connection."""
    return type("Protocol", (PatientProtocol,), {"limits": limits})
