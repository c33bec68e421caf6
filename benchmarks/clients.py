"""What the benchmarks of the server share: servers as child processes, and a client that costs next to nothing.

    with Server("octad", command, port) as server: server.wait(); await ask(server.port, body)

The client speaks HTTP/1.1 over a bare socket: it runs on the cores that the server works on, so whatever it spends is
missing there. It notes when each piece of an answer came.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass
class Answer:
    """Of one request: its status, the moments of its pieces (seconds from its beginning), what it said, its usage."""

    status: int = 0
    times: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    done: bool = False


class Server:
    """A server as a child process, ended with the block. `log` gets what it writes."""

    def __init__(
        self, name: str, command: Sequence[str | Path], port: int, log: Path, **environment: str
    ) -> None:
        self.name, self.port = name, port
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=self._log, stderr=self._log, env=os.environ | environment
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def wait(self, seconds: float = 300) -> float:
        """Until /health is 200; how long that took. Ends the benchmark where the server does."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended with {self.process.returncode}; its log: {self._log.name}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return time.monotonic() - begun
            except OSError:
                pass
            time.sleep(0.05)
        sys.exit(f"{self.name} was not ready after {seconds:g} s; its log: {self._log.name}")

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port of the loopback address that nobody has."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


async def ask(
    port: int,
    body: Mapping[str, Any] | bytes,
    *,
    path: str = "/v1/chat/completions",
    key: str | None = None,
    leave: Callable[[Answer], bool] = lambda answer: False,
    pause: float = 0.0,
) -> Answer:
    """A request and all of its answer, streamed or not. `leave` is asked after each piece (and once before the first)
    whether to go away; `pause` seconds pass before each read."""
    begun, answer = time.perf_counter(), Answer()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            "Connection: close",
        ]
        head += [f"Content-Length: {len(data)}", *([f"Authorization: Bearer {key}"] if key else [])]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        await writer.drain()
        if leave(answer):
            return answer
        headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        answer.status = int(headers.split(" ", 2)[1])
        if "text/event-stream" not in headers:
            _whole(answer, json.loads(await _body(reader, headers) or b"{}"))
            answer.times.append(time.perf_counter() - begun)
            return answer
        held = b""
        while part := await _part(reader, headers):
            held += part
            *events, held = held.split(b"\n\n")
            for event in events:
                _hear(answer, event, time.perf_counter() - begun)
            if answer.done or leave(answer):
                return answer
            if pause:
                await asyncio.sleep(pause)
        return answer
    finally:
        writer.close()


async def _part(reader: asyncio.StreamReader, headers: str) -> bytes:
    """The next piece of a body that comes in chunks, or until the connection ends."""
    if "transfer-encoding: chunked" not in headers:
        return await reader.read(1 << 16)
    size = int((await reader.readline()).split(b";")[0] or b"0", 16)
    return (await reader.readexactly(size + 2))[:-2] if size else b""


async def _body(reader: asyncio.StreamReader, headers: str) -> bytes:
    found = b""
    while part := await _part(reader, headers):
        found += part
    return found


def _whole(answer: Answer, told: dict[str, Any]) -> None:
    answer.error = told.get("error") or {}
    if told.get("choices"):
        answer.text = told["choices"][0]["message"]["content"] or ""
        answer.usage, answer.done = told.get("usage") or {}, True


def _hear(answer: Answer, event: bytes, now: float) -> None:
    data = event.partition(b"data:")[2].strip()
    if not data:
        return
    if data == b"[DONE]":
        answer.done = True
        return
    chunk = json.loads(data)
    answer.usage = chunk.get("usage") or answer.usage
    answer.error = chunk.get("error") or answer.error
    for choice in chunk.get("choices") or ():
        if text := choice["delta"].get("content"):
            answer.text += text
            answer.times.append(now)
