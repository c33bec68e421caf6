"""What goes back that is no answer of the model: errors in one form, and the JSON that all replies are made of.

    raise ApiError(400, "temperature: found 'hot', allowed: a number", param="temperature")
    response = error_response(error, scope["path"])          # {"error": {"message", "type", "param", "code"}}

Every error of every path has OpenAI's form, those of the server's own layers too. Below /v1/messages the object also is
what Anthropic's clients read ("type": "error"). An error that octad raises for a user's mistake is a 400 with its line;
anything else is a 500 without a word about the inside. That a prompt is too long is said in the words that agents look
for before they shorten a conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
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
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}
ANTHROPIC = "/v1/messages"  # and what is below
TOO_LONG = re.compile(r"the prompt has (\d+) tokens, the context (\d+) with the answer")


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

    def body(self, path: str = "") -> dict[str, Any]:
        """The object that clients of this path read."""
        anthropic = path.startswith(ANTHROPIC)
        failed = "api_error" if anthropic else "server_error"
        kind = TYPES.get(self.status, failed if self.status >= 500 else "invalid_request_error")
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return ({"type": "error"} if anthropic else {}) | {"error": about}


class BadBody(OctadError):
    """A body that is no JSON."""


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OctadError):
        text = TOO_LONG.sub(_too_long, " ".join(str(error).split()))
        text = re.sub(r", or None$", ", or null", text)  # the engine speaks to Python, this to JSON
        code = "context_length_exceeded" if "context length" in text else None
        named = re.match(r"([a-z_]+)[.:]", text)
        return ApiError(400, text, code=code, param=named[1] if named else None)
    return ApiError(500, "the server failed at this request; its log says more", code="internal_error")


def _too_long(found: re.Match[str]) -> str:
    return (
        f"the prompt is too long: it has {found[1]} tokens, and the maximum context length is {found[2]} tokens,"
        " the answer among them"
    )


def error_response(error: Exception, path: str) -> Response:
    """The whole response for an exception at this path."""
    told = as_api_error(error)
    return json_response(told.body(path), told.status, told.headers)


def shown(value: object) -> str:
    """What a client sent, for a message: short, in ASCII, and quick however large it is."""
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return ascii(value[:100] if isinstance(value, str) else value)[:100]


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, compact, in UTF-8."""
    return Response(encoded(content), status, headers, "application/json")


def with_choices(about: Mapping[str, Any], choices: Iterable[Mapping[str, Any]]) -> bytes:
    """An answer as JSON, choice by choice: Python does nothing else while a single value is encoded."""
    return encoded(about)[:-1] + b',"choices":[' + b",".join(map(encoded, choices)) + b"]}"


def encoded(content: Any) -> bytes:
    """A value as JSON; halves of surrogate pairs and other oddities of clients' own text stay escaped."""
    try:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(content, separators=(",", ":")).encode()
