"""Clients that leave, in every stage, and floods: blocks are free at once, and nobody else's answer changes."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from serving import CONTEXT, Running, Start, running, served_mixture, start

LONG = {"model": "mixture", "temperature": 0, "max_tokens": 3000, "ignore_eos": True}
SHORT = {
    "model": "mixture",
    "messages": [{"role": "user", "content": "Hi"}],
    "temperature": 0,
    "max_tokens": 40,
}


def until(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def asking(running: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    """A connection with this request on its way."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=20)
    connection.sendall(head.encode() + raw)
    return connection


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_whoever_leaves_is_let_go(
    running: Running, stream: bool, stage: str, leave: Callable[[socket.socket], None]
) -> None:
    expected = running.post("/v1/chat/completions", SHORT).json()["choices"][0]["message"]["content"]
    text = "x" * (3500 if stage == "prefill" else 3)
    body = LONG | {
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
        "max_tokens": 500 if stage == "prefill" else 3000,
    }
    before = running.llm.engine.stats.generated_tokens
    connection = asking(running, body)
    until(lambda: running.llm.engine.stats.running == 1)
    if stage == "decode":
        until(lambda: running.llm.engine.stats.generated_tokens > before + 3)
    other: dict[str, Any] = {}
    neighbour = threading.Thread(
        target=lambda: other.update(running.post("/v1/chat/completions", SHORT).json())
    )
    neighbour.start()
    leave(connection)
    neighbour.join(30)
    until(running.idle)
    assert running.llm.engine.stats.generated_tokens - before < 2000
    assert other["choices"][0]["message"]["content"] == expected
    assert running.app._generator is not None
    until(lambda: running.app._generator.queue.here == 0)  # type: ignore[union-attr]


def test_one_that_waits_and_leaves(start: Start) -> None:
    """With one place in the engine: the second waits, leaves, and the first is answered to the end."""
    running = start(engine={"max_num_seqs": 1})
    first = asking(running, LONG | {"messages": [{"role": "user", "content": "first"}], "max_tokens": 600})
    until(lambda: running.llm.engine.stats.running == 1)
    second = asking(running, LONG | {"messages": [{"role": "user", "content": "second"}]})
    until(lambda: running.llm.engine.stats.waiting == 1)
    second.close()
    until(lambda: running.llm.engine.stats.waiting == 0)
    answer = b""
    while b"total_tokens" not in answer:
        answer += first.recv(65536)
    assert b'"completion_tokens":600' in answer
    first.close()
    until(running.idle)


def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    running = start(engine={"max_num_seqs": 1}, max_queue=1)
    busy = [asking(running, LONG | {"messages": [{"role": "user", "content": f"{i}"}]}) for i in range(2)]
    until(lambda: running.app.generator.queue.here == 2)
    refused = running.post("/v1/chat/completions", SHORT)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    began = time.monotonic()
    assert running.get("/health").json() == {"status": "ok"}
    assert "octad:num_requests_waiting{" in running.get("/metrics").text
    assert time.monotonic() - began < 10
    for connection in busy:
        connection.close()
    until(running.idle)
    assert running.post("/v1/chat/completions", SHORT).status_code == 200


def test_an_answer_that_takes_too_long(start: Start) -> None:
    running = start(timeout=0.3)
    body = LONG | {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4000}
    late = running.post("/v1/chat/completions", body)
    assert late.status_code == 408
    assert late.json()["error"]["code"] == "request_timeout"
    stream = running.post("/v1/chat/completions", body | {"stream": True}).text
    frames = [frame.removeprefix("data: ") for frame in stream.split("\n\n") if frame.startswith("data")]
    assert json.loads(frames[-2])["error"]["code"] == "request_timeout"
    until(running.idle)


def test_a_slow_reader_gets_everything(running: Running) -> None:
    """It reads nothing for a while; the server neither waits with others nor loses a piece."""
    body = LONG | {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1500,
        "stream": True,
        "speakers": True,
    }
    connection = asking(running, body)
    until(lambda: running.llm.engine.stats.running == 1)
    assert running.post("/v1/chat/completions", SHORT).status_code == 200
    until(lambda: running.llm.engine.stats.running == 0, 60)
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += connection.recv(65536)
    connection.close()
    assert data.count(b'"expert"') == 1500
    assert b"[DONE]" in data


def test_metrics_count(start: Start) -> None:
    running = start()
    running.post("/v1/chat/completions", SHORT)
    text = running.get("/metrics").text
    found = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line[0] != "#"
    }
    label = '{model_name="mixture"}'
    assert found[f"octad:generation_tokens_total{label}"] == 40
    assert found[f"octad:prompt_tokens_total{label}"] == 20
    assert found[f"octad:time_to_first_token_seconds_count{label}"] == 1
    assert found[f"octad:e2e_request_latency_seconds_count{label}"] == 1
    assert found[f"octad:inter_token_latency_seconds_count{label}"] == 39
    assert found['octad:request_success_total{finished_reason="length",model_name="mixture"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("octad:expert_tokens_total")) == 40
    assert found[f"octad:kv_cache_usage_perc{label}"] == 0
    assert found[f"octad:num_requests_running{label}"] == 0
