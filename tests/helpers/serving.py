"""A server around a tiny random mixture, on a thread of its own and a real port."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import openai
import pytest
import torch
from tiny_chat import make_mixture

from octad.engine.llm import LLM
from octad.serve.app import Application
from octad.serve.lifecycle import DrainingServer, bind, server
from octad.serve.limits import Limits
from octad.serve.listing import ModelNames
from octad.serve.security import Access

if TYPE_CHECKING:
    from tiny_models import TinyCheckpoint

CONTEXT = 4096
LIMITS = Limits(body_bytes=1 << 20, header_seconds=1.0, body_seconds=1.0)


@dataclass
class Running:
    """A server that answers at `url`."""

    app: Application
    server: DrainingServer
    port: int
    llm: LLM

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60, **options)

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0, timeout=60)

    def raw(self, data: bytes, *, wait: float = 5) -> bytes:
        """Everything that the server says to these bytes until it closes, or `wait` seconds have passed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=wait) as connection:
            connection.sendall(data)
            found = b""
            try:
                while part := connection.recv(65536):
                    found += part
            except TimeoutError:
                pass
            return found

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        stats = self.llm.engine.stats
        return (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def served_mixture(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny_checkpoint("mixtral", vocab_size=257, max_position_embeddings=CONTEXT)
    return make_mixture(source, tmp_path_factory.mktemp("serve") / "mixture")


@pytest.fixture(scope="session")
def start(served_mixture: Path) -> Iterator[Start]:
    """Starts servers; ends them with the session."""
    ends: list[Callable[[], None]] = []

    def begin(
        access: Access | None = None,
        limits: Limits = LIMITS,
        engine: dict[str, Any] | None = None,
        model: Path | None = None,
        **options: Any,
    ) -> Running:
        torch.set_num_threads(1)
        llm = LLM(
            model or served_mixture, dtype="float32", device="cpu", **({"num_blocks": 600} | (engine or {}))
        )
        app = Application(ModelNames.now(["mixture"]), access, limits, **options)
        app.ready(llm, {"experts": [{"name": "general", "domain": "news"}]})
        opened = bind("127.0.0.1", 0)
        made = server(app.asgi, app.state, limits)
        thread = threading.Thread(target=lambda: asyncio.run(made.serve([opened])), daemon=True)
        thread.start()

        def end() -> None:
            made.should_exit = True
            thread.join(10)

        ends.append(end)
        return Running(app, made, opened.getsockname()[1], llm)

    yield begin
    for end in ends:
        end()


@pytest.fixture(scope="session")
def running(start: Start) -> Running:
    return start()
