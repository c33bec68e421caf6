"""One line of JSON for each request on stderr, with its id; never what was said.

    app = Logged(app)

A request's id is the client's x-request-id where that is a plain word, else a new one; every answer carries it. A fault
of the server is answered with a 500 in the form of all errors, and its traceback goes to the log.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octad.errors import OctadError
from octad.serve.event_stream import ClientGone
from octad.serve.replies import ApiError, error_response

log = logging.getLogger("octad.serve")
access = logging.getLogger("octad.serve.access")
PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Logged:
    """The application with ids, a line for each request, and an answer whatever happens inside."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if PLAIN.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id
        began, status = time.monotonic(), 0

        async def reply(message: Message) -> None:
            """Passes on what goes back, with the request's id in its head."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                head = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                present = {name.lower() for name, _ in message.get("headers", [])}
                more = [pair for pair in head if pair[0] not in present]
                message["headers"] = [*message.get("headers", []), *more]
            await send(message)

        try:
            await self.app(scope, receive, reply)
        except ClientGone:
            status = status or 499
        except Exception as error:
            if not isinstance(error, (ApiError, OctadError)):
                log.exception("request %s failed", request_id)
            if not status:
                await error_response(error, scope["path"])(scope, receive, reply)
        finally:
            self._line(scope, request_id, status, time.monotonic() - began)

    def _line(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request": request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
        }
        access.info(json.dumps(told))
