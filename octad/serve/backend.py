"""Another server behind this one: how it is reached, whether it is well, and what it tells of its routing.

    backend = Backend("http://gpu:8000", key="...", names=["general", "french"], shape=(30, 2))
    backend.watch(state)                                   # a thread: health, and once, what kind of server it is
    response = await backend.send("POST", "/v1/chat/completions", body, headers)     # open; close it

Whether it tells its routing is seen by asking it for one token (vLLM says so by no other means). What cannot be reached
is 502, what takes too long 504, in the form of all errors; whatever the backend's own errors look like, they are brought
into that form, too. No proxy of the environment is used, no redirect followed.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from octad.errors import DataError, RequestError
from octad.guard import read_text
from octad.serve.foreign_routes import routes_in
from octad.serve.lifecycle import ServerState
from octad.serve.replies import ApiError

CONNECT_SECONDS, SILENT_SECONDS, EVERY = 10.0, 600.0, 2.0
PASSED_ON = ("content-type", "accept", "anthropic-version", "anthropic-beta")
PROBE = "The quick brown fox jumps over the lazy dog. 1, 2, 3. def f(x): return x + 1\nBonjour, le monde."
log = logging.getLogger("octad.serve")


@dataclass(frozen=True)
class Routing:
    """What a backend tells of its routing. kind: "octad" (everything), "vllm", "sglang", or "" for nothing."""

    kind: str = ""
    layers: int = 0
    top_k: int = 0
    names: tuple[str, ...] = ()

    @property
    def foreign(self) -> bool:
        """Whether speakers must be found from ids."""
        return self.kind in ("vllm", "sglang")


class Backend:
    """`key` is sent in place of the clients' own; `names` of the experts and `shape` (layers, top_k) are of the mixture
    that it serves, where that is at hand. `seconds` that an answer may take. `stage`: how far it is with starting."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        names: Sequence[str] = (),
        shape: tuple[int, int] = (0, 0),
        pass_keys: bool = True,
        seconds: float | None = None,
        stage: Callable[[], str] | None = None,
    ) -> None:
        self.url, self.key, self.pass_keys = base_url(url), key, pass_keys
        self.names, self.shape, self.seconds, self._stage = tuple(names), shape, seconds, stage
        self.routing: Routing | None = None
        self.ended = threading.Event()
        timeout = httpx2.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS, pool=None)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def send(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], request_id: str = ""
    ) -> httpx2.Response:
        """The response, whose body is still to be read. Raises ApiError for a backend that cannot be reached, and with
        its own status for an error that it answers."""
        given = {name: headers[name] for name in PASSED_ON if name in headers}
        given |= self._keys(headers) | {"accept-encoding": "identity"}
        given |= {"x-request-id": request_id} if request_id else {}
        request = self._client.build_request(method, self.url + path, content=body, headers=given)
        try:
            response = await self._client.send(request, stream=True)
            if response.status_code < 400:
                return response
            try:
                raise as_error(response, await response.aread())
            finally:
                await response.aclose()
        except httpx2.HTTPError as error:
            raise told(error) from None

    def _keys(self, headers: Mapping[str, str]) -> dict[str, str]:
        if self.key is not None:
            own = {"authorization": f"Bearer {self.key}"}
            return own | ({"x-api-key": self.key} if "x-api-key" in headers else {})
        names = ("authorization", "x-api-key") if self.pass_keys else ()
        return {name: headers[name] for name in names if name in headers}

    # ---- its health ----------------------------------------------------------------------------------------

    def watch(self, state: ServerState) -> threading.Thread:
        """Ask for its health from now on, until `ended` is set; `state` tells what comes of it."""
        thread = threading.Thread(target=self._watch, args=(state,), name="octad backend", daemon=True)
        thread.start()
        return thread

    def _watch(self, state: ServerState) -> None:
        key = {"authorization": f"Bearer {self.key}"} if self.key is not None else {}
        with httpx2.Client(timeout=5, trust_env=False, headers=key) as client:
            met = False
            while not self.ended.is_set():
                well, stage, progress = self._look(client)
                if well:
                    if self.routing is None:
                        self.routing = self._probe(client)
                    met = True
                    state.become("ready", "ready", 1.0)
                else:
                    state.become("unreachable" if met else "loading", stage, progress)
                self.ended.wait(EVERY if well else EVERY / 4)

    def _look(self, client: httpx2.Client) -> tuple[bool, str, float]:
        """Whether it can answer; else how far it is."""
        try:
            found = client.get(self.url + "/health")
            if found.status_code in (404, 405):  # it has no such path
                found = client.get(self.url + "/v1/models")
        except httpx2.HTTPError as error:
            stage = self._stage() if self._stage else told(error).message
            return False, stage, 0.0
        if found.status_code in (200, 401, 403):
            return True, "", 1.0
        about = _json(found)
        progress = about.get("progress")
        stage = about.get("stage") or as_error(found, found.content).message
        return False, str(stage)[:200], progress if isinstance(progress, float) else 0.0

    def _probe(self, client: httpx2.Client) -> Routing:
        """What it tells of its routing, found out by asking."""
        try:
            own = _json(client.get(self.url + "/v1/experts"))
            if isinstance(own.get("data"), list) and isinstance(own.get("layers"), int):
                return Routing("octad" if own["data"] else "")
            models = _json(client.get(self.url + "/v1/models")).get("data") or [{}]
            body = {
                "model": models[0].get("id"),
                "prompt": PROBE,
                "max_tokens": 1,
                "temperature": 0,
                "return_routed_experts": True,
            }
            answer = client.post(self.url + "/v1/completions", json=body, timeout=120)
        except (httpx2.HTTPError, AttributeError, KeyError) as error:
            log.warning("the backend's routing could not be asked for: %s", error)
            return Routing()
        if answer.status_code in (401, 403):
            log.warning("the backend wants a key: without --backend-key-file its routing is not looked for")
        return self._routing(_json(answer))

    def _routing(self, answer: Mapping[str, Any]) -> Routing:
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        ids = routes_in(answer, choice, self.shape)
        if ids is None or not ids.size:
            return Routing()
        kind = "vllm" if isinstance(choice.get("routed_experts"), str) else "sglang"
        names = self.names or tuple(f"expert {number}" for number in range(int(ids.max()) + 1))
        layers, top_k = self.shape if self.shape[0] else ids.shape[1:]
        log.warning("the backend tells its routing as %s does: %d experts", kind, len(names))
        return Routing(kind, int(layers), int(top_k), names)


def base_url(text: str) -> str:
    """A server's address without /v1 and the last slash. Raises RequestError for what is none."""
    parts = urlsplit(text)
    try:
        named = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError:
        named = False
    if not named or parts.query or parts.fragment or "@" in parts.netloc:
        raise RequestError(f"--backend: found {text!r}, allowed: an address such as http://host:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def key_of(path: Path | None) -> str | None:
    """The key in a file of one line. Raises DataError for a file without."""
    if path is None:
        return None
    key = read_text(path, what=" the key").strip()
    if not key or not key.isprintable() or not key.isascii() or " " in key:
        raise DataError(f"{path}: should hold one key, in one line")
    return key


def told(error: httpx2.HTTPError) -> ApiError:
    """What a client hears of a backend that fails."""
    if isinstance(error, httpx2.TimeoutException):
        return ApiError(504, "the backend did not answer in time", code="backend_timeout")
    if isinstance(error, httpx2.ConnectError):
        return ApiError(
            502, "the backend cannot be reached", code="backend_unreachable", headers={"Retry-After": "2"}
        )
    return ApiError(502, "the connection to the backend broke", code="backend_broke")


def as_error(response: httpx2.Response, body: bytes) -> ApiError:
    """A backend's error, whatever it looks like: OpenAI's object, a text under "error", SGLang's flat object, FastAPI's
    "detail", a proxy's page."""
    found = _json(response, body)
    inner = found.get("error", found)
    about: Mapping[str, Any] = inner if isinstance(inner, Mapping) else {"message": inner}
    detail = about.get("message") or about.get("detail") or found.get("detail")
    plain = detail if isinstance(detail, str) else json.dumps(detail) if detail else ""
    code, param = about.get("code"), about.get("param")
    return ApiError(
        response.status_code,
        plain[:2000] or f"the backend answered {response.status_code}",
        code=code if isinstance(code, str) else None,
        param=param if isinstance(param, str) else None,
        headers={
            name: response.headers[name]
            for name in ("retry-after", "www-authenticate")
            if name in response.headers
        },
    )


def _json(response: httpx2.Response, body: bytes | None = None) -> dict[str, Any]:
    """The object in a body; {} for anything else."""
    try:
        found = json.loads(response.content if body is None else body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
