"""Servers in front of other servers, each on a thread of its own and a real port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from serving import LIMITS

from octad.serve.backend import Backend
from octad.serve.backend_app import BackendApplication
from octad.serve.lifecycle import bind, server
from octad.serve.security import Access


@dataclass
class Fronted:
    """A server in front of another."""

    app: BackendApplication
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=30, **options)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0} | options)


Front = Callable[..., Fronted]


@pytest.fixture
def front() -> Iterator[Front]:
    """Starts servers in front of an address."""
    ends: list[Callable[[], None]] = []

    def begin(
        url: str, access: Access | None = None, *, wait: bool = True, made: Any = None, **options: Any
    ) -> Fronted:
        backend = Backend(url, **options)
        app = BackendApplication(backend, access, LIMITS, made=made)
        opened = bind("127.0.0.1", 0)
        made_server = server(app.asgi, app.state, LIMITS)
        thread = threading.Thread(target=lambda: asyncio.run(made_server.serve([opened])), daemon=True)
        thread.start()
        watching = backend.watch(app.state)

        def end() -> None:
            made_server.should_exit = True
            backend.ended.set()
            thread.join(10)
            watching.join(10)

        ends.append(end)
        if wait:
            until(lambda: app.state.status == "ready")
        return Fronted(app, opened.getsockname()[1])

    yield begin
    for end in ends:
        end()


def until(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
