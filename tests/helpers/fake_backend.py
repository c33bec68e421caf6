"""A server with the wire format of `octad serve` and no model: it says what a test tells it to.

    with FakeBackend() as backend:
        backend.reply = [Said("Hel", "python", 0.9), Said("lo", "french", 0.6)]
        backend.url, backend.requests

One thread per request (http.server); the page's files come from octad.serve.page with its headers.
"""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from octad.serve.page import HEADERS, assets

NAMES = ["general", "python", "french", "german", "maths", "c", "literature", "spanish"]
LAYERS, TOP_K = 30, 2
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class Said:
    """A token of the answer, its speaker's name and weight."""

    token: str
    expert: str = "general"
    weight: float = 0.8


def spoken(text: str, by: str = "general", weight: float = 0.8) -> list[Said]:
    """A text as tokens of one speaker: a word with the space before it is a token."""
    return [Said(token, by, weight) for token in re.findall(r"\s?\S+|\s", text)]


@dataclass
class Refusal:
    """An error in OpenAI's form, and how many requests meet it."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1


def routes(tokens: int, start: int, experts: int) -> tuple[str, str]:
    """Experts and weights, [rows, layers, top_k], as the wire has them: row r goes to expert (r + layer) % experts first,
    with 5, 6, 7 or 8 tenths of the weight in turn; layer 0 has no experts."""
    rows = PROMPT_TOKENS + tokens - 1 - start
    turn = np.arange(rows)[:, None] + start + np.arange(LAYERS)
    chosen = np.stack([turn % experts, (turn + 1) % experts], axis=-1).astype(np.int16)
    chosen[:, 0] = -1
    first = (5 + turn % 4) / 10
    return _npy(chosen), _npy(np.stack([first, 1 - first], axis=-1).astype(np.float32))


def _npy(values: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return base64.b64encode(buffer.getvalue()).decode()


class FakeBackend:
    """What it says and how it fails is set from outside, at any time."""

    def __init__(self) -> None:
        self.reply: list[Said] = spoken("Hello from the mixture.")
        self.by_mask: dict[tuple[str, ...], list[Said]] = {}
        self.names = NAMES
        self.routing = True
        self.weights = True  # routed_weights beside routed_experts
        self.key: str | None = None
        self.health: dict[str, Any] | None = None  # a body for 503
        self.refusal: Refusal | None = None
        self.pace = 0.0  # seconds between tokens
        self.slices: int | None = None  # bytes that are sent at a time, with \\r\\n as the end of lines
        self.break_after: int | None = None  # tokens after which the connection is cut
        self.finish = "stop"
        self.make_up: dict[str, Any] | None = None
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        self.hold = threading.Event()  # cleared: tokens wait
        self.hold.set()

    def __enter__(self) -> FakeBackend:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chat.completion.chunk objects of an answer."""
        mask = tuple(body.get("only_experts", ()))
        said = self.by_mask.get(mask, self.reply)
        for one in said:
            choice: dict[str, Any] = {"index": 0, "delta": {"content": one.token}, "finish_reason": None}
            if body.get("speakers"):
                choice["speakers"] = [{"token": one.token, "expert": one.expert, "weight": one.weight}]
            yield self._chunk(choices=[choice])
        last: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": self.finish}
        if body.get("return_routed_experts"):
            start = body.get("routed_experts_prompt_start", 0)
            last["routed_experts"], weights = routes(len(said), start, len(self.names))
            last |= {"routed_weights": weights} if self.weights else {}
        yield self._chunk(choices=[last])
        usage = {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": len(said),
            "total_tokens": PROMPT_TOKENS + len(said),
        }
        yield self._chunk(choices=[], usage=usage)

    def _chunk(self, **fields: Any) -> dict[str, Any]:
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "mixture",
            **fields,
        }

    def experts(self) -> dict[str, Any]:
        """The answer of /v1/experts."""
        rows = [{"index": index, "name": name} for index, name in enumerate(self.names)]
        return {"data": rows, "layers": LAYERS, "top_k": TOP_K, "make_up": self.make_up}


def _handler(backend: FakeBackend) -> type[BaseHTTPRequestHandler]:
    page = assets()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            name = "index.html" if path == "/" else path.removeprefix("/page/")
            if name in page and (path == "/" or path.startswith("/page/")):
                return self.send(200, page[name].body, page[name].media_type, HEADERS)
            if path == "/health":
                return self.json(503, backend.health) if backend.health else self.json(200, {"status": "ok"})
            if not self.allowed():
                return None
            if path == "/v1/models":
                return self.json(200, {"object": "list", "data": [{"id": "mixture", "object": "model"}]})
            if path == "/v1/experts" and backend.routing:
                return self.json(200, backend.experts())
            return self.error(Refusal(404, "Not found", "not_found"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return None
            backend.requests.append(body)
            refusal = backend.refusal
            if refusal and refusal.times > 0:
                refusal.times -= 1
                return self.error(refusal)
            return self.stream(body)

        def allowed(self) -> bool:
            if backend.key is None or self.headers.get("Authorization") == f"Bearer {backend.key}":
                return True
            self.error(Refusal(401, "Incorrect API key provided.", "invalid_api_key"))
            return False

        def stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for at, chunk in enumerate(backend.chunks(body)):
                    if at == backend.break_after:
                        return
                    backend.hold.wait(20)
                    time.sleep(backend.pace)
                    self.frame(f": keep-alive\n\ndata: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")
            except (BrokenPipeError, ConnectionResetError):
                backend.cancelled += 1

        def frame(self, data: bytes) -> None:
            if backend.slices:
                data = data.replace(b"\n", b"\r\n")
            for at in range(0, len(data), backend.slices or len(data)):
                self.wfile.write(data[at : at + (backend.slices or len(data))])
                self.wfile.flush()

        def error(self, refusal: Refusal) -> None:
            error = {"message": refusal.message, "type": "error", "param": None, "code": refusal.code}
            self.json(refusal.status, {"error": error}, refusal.headers)

        def json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self.send(status, json.dumps(value).encode(), "application/json", headers or {})

        def send(self, status: int, body: bytes, media_type: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": media_type,
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
