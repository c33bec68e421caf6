"""What goes back that is no answer of the model: errors in one form, and the JSON that all replies are made of.

    raise ApiError(400, "temperature: found 'hot', allowed: a number", param="temperature")
    response = error_response(error)          # {"error": {"message", "type", "param", "code"}}

Every error of every path has OpenAI's form, those of the server's own layers too. Below /v1/messages the object also is
what Anthropic's clients read ("type": "error"). An error that octad raises for a user's mistake is a 400 with its line;
anything else is a 500 without a word about the inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from octad.errors import OctadError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    411: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What the client did wrong, or why it cannot be served now."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The object that clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"type": "error", "error": about}


class BadBody(OctadError):
    """A body that is no JSON."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OctadError):
        text = " ".join(str(error).split())
        code = "context_length_exceeded" if " tokens, the context " in text else None
        named = re.match(r"([a-z_]+)[.:]", text)
        return ApiError(400, text, code=code, param=named[1] if named else None)
    return ApiError(500, "the server failed at this request; its log says more", code="internal_error")


def error_response(error: Exception) -> Response:
    """The whole response for an exception."""
    told = as_api_error(error)
    return json_response(told.body(), told.status, told.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, compact, in UTF-8."""
    return Response(encoded(content), status, headers, "application/json")


def encoded(content: Any) -> bytes:
    """A value as JSON; halves of surrogate pairs and other oddities of clients' own text stay escaped."""
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":")).encode()
