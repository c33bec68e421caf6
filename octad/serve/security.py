"""Who may ask: pure ASGI layers around the application that look at Host, Origin and keys before anything else.

    app = Guarded(app, Access(hosts=..., origins=..., keys=...))

Safe by default, because a page anywhere on the web can make a browser send requests to this machine. On a loopback
address the Host must be a name of this machine (a foreign name that resolves to it is how DNS rebinding works); a request
that changes something and comes from a page of another origin is refused, whatever its content type; nobody may read
answers across origins unless named. Keys are compared in constant time.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octad.errors import DataError, RequestError
from octad.guard import read_text
from octad.serve.replies import ApiError, error_response

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SAFE = ("GET", "HEAD", "OPTIONS")
OPEN_PATHS = re.compile(
    r"^/(health|page/.*)?$"
)  # what needs no key: the page (which asks for one) and health
ALLOWED_HEADERS = "Authorization, Content-Type, X-API-Key, X-Request-Id, Anthropic-Version, Anthropic-Beta"
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/?#@\\\[\]]+))(?::[0-9]{0,5})?")  # RFC 9110, 7.2
HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2000}")  # of a preflight


@dataclass(frozen=True)
class Access:
    """`hosts`: names that a Host may have, None for any. `origins`: pages that may read answers. `keys`: digests of the
    keys, empty for a server without."""

    hosts: frozenset[str] | None = frozenset(LOOPBACK)
    origins: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        address: str,
        allowed_hosts: Iterable[str] = (),
        cors: Iterable[str] = (),
        key_file: Path | None = None,
    ) -> Access:
        """From the command line's options. Raises RequestError for an origin that is none, DataError for a key file that
        cannot be read or is empty."""
        named = frozenset(name.lower() for name in allowed_hosts)
        checked = bool(named) or address in LOOPBACK
        hosts = named | frozenset(LOOPBACK) | {address.lower()} if checked else None
        return cls(hosts, frozenset(map(_origin, cors)), _keys(key_file) if key_file else ())


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
        raise RequestError(f"--cors: found {text!r}, allowed: an origin such as https://app.example")
    return f"{parts.scheme}://{parts.netloc}".lower()


def _keys(path: Path) -> tuple[bytes, ...]:
    lines = read_text(path, what=" the keys").splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise DataError(f"{path}: holds no key; write one a line")
    return tuple(sha256(key.encode()).digest() for key in keys)


class Guarded:
    """The application, for those who may ask."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin is not None and origin.lower() in self.access.origins
        reply = _sharing(send, origin) if shared and origin else send
        try:
            self._check_host(headers)
            if shared and scope["method"] == "OPTIONS":
                await _preflight(headers)(scope, receive, reply)
                return
            self._check_origin(scope, headers, shared)
            self._check_key(scope, headers)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, reply)
            return
        await self.app(scope, receive, reply)

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        if self.access.hosts is None or not given:  # HTTP/1.0 has none; browsers always send one
            return
        if len(given) > 1 or host_name(given[0]) not in self.access.hosts:
            raise ApiError(
                403,
                f"host {ascii(given[0])[:100]} is not a name of this server; start it with --allowed-host NAME",
                code="host_not_allowed",
            )

    def _check_origin(self, scope: Scope, headers: Headers, shared: bool) -> None:
        """A page of another origin may not make this server do anything."""
        origin = headers.get("origin")
        if shared or scope["method"] in SAFE:
            return
        if origin is None:
            foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        else:
            foreign = urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        if foreign:
            raise ApiError(
                403,
                f"pages of origin {ascii(origin)[:100]} may not use this server; start it with --cors ORIGIN",
                code="origin_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self.access.keys or OPEN_PATHS.match(scope["path"]):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given += [headers["x-api-key"].strip()] if "x-api-key" in headers else []  # some clients send both
        digests = [sha256(key.encode("latin-1", "replace")).digest() for key in given]
        # all of them, in any case
        matches = [hmac.compare_digest(digest, key) for digest in digests for key in self.access.keys]
        if True not in matches:
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY"
                if not any(given)
                else "the API key is not valid",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def host_name(host: str) -> str:
    """The name of a Host header, without its port and an IPv6 address's brackets; "" for what is no such header."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


def _sharing(send: Send, origin: str) -> Send:
    """Adds what lets a page of this origin read the answer."""

    async def reply(message: Message) -> None:
        """`send`, with the headers of a page of another origin."""
        if message["type"] == "http.response.start":
            _add_headers(
                message,
                {
                    "Access-Control-Allow-Origin": origin,
                    "Access-Control-Expose-Headers": "X-Request-Id, Retry-After",
                    "Vary": "Origin",
                },
            )
        await send(message)

    return reply


def _add_headers(message: MutableMapping[str, Any], headers: dict[str, str]) -> None:
    pairs = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    message["headers"] = [*message.get("headers", []), *pairs]


def _preflight(asked: Headers) -> Response:
    """For an origin that is named: it may send the headers that it asks for (clients have some of their own)."""
    wanted = asked.get("access-control-request-headers", "")
    more = f", {wanted}" if HEADER_NAMES.fullmatch(wanted) else ""
    allowed = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": ALLOWED_HEADERS + more,
        "Access-Control-Max-Age": "600",
    }
    if asked.get("access-control-request-private-network") == "true":  # a page of the web, a server at home
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=allowed)
