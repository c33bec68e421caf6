"""Servers with vLLM's, SGLang's and llama-server's answers and no model, after what those send (see docs/serving.md).

    with FakeEngine("vllm") as engine: engine.url, engine.requests, engine.cancelled

An answer is WORDS[:max_tokens], a token each; token t of it was led to by expert (t + layer) % 4 in first place, and by
the one after it in second. As a program it stands for the command `vllm`:

    python fake_engines.py serve MODEL --served-model-name NAME --host 127.0.0.1 --port N [--enable-return-routed-experts]
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

WORDS = ["Hello", " from", " a", " bigger", " machine", ",", " über", " there", "."]
PROMPT = [5, 6, 7]  # any prompt's ids
LAYERS, TOP_K = 2, 2
FIRST = 100  # id of the first word


def route(position: int, layer: int) -> list[int]:
    """Who works at a position: the answer's token t is led to by position len(PROMPT) - 1 + t."""
    turn = position - (len(PROMPT) - 1)
    return [(turn + layer) % 4, (turn + layer + 1) % 4]


def routes(rows: range) -> np.ndarray:
    """[rows, layers, top_k]"""
    return np.array([[route(at, layer) for layer in range(LAYERS)] for at in rows], np.int32).reshape(
        -1, LAYERS, TOP_K
    )


class FakeEngine:
    """kind: vllm, sglang, or plain."""

    def __init__(self, kind: str, *, routing: bool = True, key: str | None = None, port: int = 0) -> None:
        self.kind, self.routing, self.key = kind, routing, key
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.pace, self.cancelled, self.down, self.status = 0.0, 0, False, 200
        self.error: Any = {"detail": "something"}
        self.server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeEngine:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    # ---- answers -------------------------------------------------------------------------------------------

    def routing_of(self, answered: int, start: int) -> dict[str, Any]:
        """For a choice (vLLM) or the answer (SGLang)."""
        ids = routes(range(start, len(PROMPT) + answered - 1))
        if self.kind == "sglang":
            return {"sglext": {"routed_experts": base64.b64encode(ids.tobytes()).decode()}}
        file = io.BytesIO()
        np.save(file, ids.astype(np.uint8))
        return {"routed_experts": base64.b64encode(file.getvalue()).decode()}

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        chat, prompt = path.endswith("chat/completions"), PROMPT
        if isinstance(body.get("prompt"), list):
            prompt = body["prompt"]
            assert prompt[: len(PROMPT)] == PROMPT, "the prompt's ids are those that were told"
        words = WORDS[: body.get("max_tokens") or len(WORDS)]
        choices = []
        for index in range(body.get("n") or 1):
            choice: dict[str, Any] = {"index": index, "finish_reason": "stop"}
            if chat:
                choice["message"] = {"role": "assistant", "content": "".join(words)}
            else:
                choice["text"] = "".join(words)
            choice["logprobs"] = self._logprobs(body, chat, words)
            if self.routing and self.kind == "vllm":
                answered = len(words) + len(prompt) - len(PROMPT)
                choice |= self.routing_of(answered, body.get("routed_experts_prompt_start", 0))
            choices.append(choice)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(words), "total_tokens": 0}
        found = {"id": "x", "object": "o", "created": 1, "model": "m", "choices": choices, "usage": usage}
        if self.routing and self.kind == "sglang" and body.get("return_routed_experts"):
            found |= self.routing_of(len(words), body.get("routed_experts_start_len", 0))
        return found

    def _logprobs(self, body: dict[str, Any], chat: bool, words: list[str]) -> Any:
        if body.get("logprobs") in (None, False):
            return None
        if not chat:
            return {"tokens": words, "token_logprobs": [-1.0] * len(words), "top_logprobs": None}
        return {"content": [{"token": word, "logprob": -1.0, "top_logprobs": []} for word in words]}

    def chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A streamed chat. The two middle words come in one chunk, as with a stream interval."""
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        words = WORDS[: body.get("max_tokens") or len(WORDS)]
        found: list[dict[str, Any]] = [
            head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        ]
        ids = bool(body.get("return_token_ids")) and self.kind == "vllm"
        if ids:
            found[0]["prompt_token_ids"] = PROMPT
        at = 0
        for size in [1] * 3 + [2] + [1] * len(words):
            part = words[at : at + size]
            if not part:
                break
            choice: dict[str, Any] = {"index": 0, "delta": {"content": "".join(part)}, "finish_reason": None}
            choice["logprobs"] = self._logprobs(body, True, part)
            if ids:
                choice["token_ids"] = list(range(FIRST + at, FIRST + at + len(part)))
            found.append(head | {"choices": [choice]})
            at += len(part)
        found.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.kind == "sglang" and self.routing and body.get("return_routed_experts"):
            told = self.routing_of(len(words), body.get("routed_experts_start_len", 0))
            found.append(head | {"choices": []} | told)
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
            found.append(head | {"choices": [], "usage": usage})
        return found


def _handler(engine: FakeEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Silent."""

        def do_GET(self) -> None:
            self._note({})
            if self.path == "/health":
                self._json(503 if engine.down else 200, {})
            elif self.path == "/v1/models":
                self._json(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})
            else:
                self._json(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._note(body)
            if engine.key and self.headers.get("authorization") != f"Bearer {engine.key}":
                self._json(401, {"error": "Unauthorized"})
            elif engine.status != 200:
                self._json(engine.status, engine.error)
            elif body.get("stream"):
                self._stream(body)
            else:
                self._json(200, engine.answer(self.path, body))

        def _note(self, body: dict[str, Any]) -> None:
            engine.requests.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))

        def _json(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for chunk in engine.chunks(body):
                    self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                    self.wfile.flush()
                    time.sleep(engine.pace)
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                engine.cancelled += 1

    return Handler


def main(arguments: list[str]) -> None:
    """What `vllm serve` does, as far as octad sees it."""
    if os.environ.get("FAKE_VLLM_REFUSES") in arguments:
        print("ValueError: this needs another model runner", flush=True)
        sys.exit(1)
    if "FAKE_VLLM_NAMELESS" in os.environ and arguments[0] == "serve":
        print("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", flush=True)
        sys.exit(1)
    print("INFO Loading safetensors checkpoint shards:  50% Completed", flush=True)
    time.sleep(float(os.environ.get("FAKE_VLLM_SECONDS", "0")))
    port = int(arguments[arguments.index("--port") + 1])
    routing = "--enable-return-routed-experts" in arguments
    with FakeEngine("vllm", routing=routing, key=os.environ["VLLM_API_KEY"], port=port):
        print(f"INFO Started with {arguments[1:]}", flush=True)
        while True:
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1:])
