"""A server's life: the port is open at once, the model is read behind it, and SIGTERM lets answers end.

    state = ServerState(); start_loading(state, lambda tell: LLM("mixture/"))
    run(app, state, host="127.0.0.1", port=8000, limits=Limits())

/health says 503 with its progress until the first token could be made, 200 then, 503 again while draining: a balancer
that asks it sends nobody too early or too late. While draining, requests that run are answered to the end, or until
DRAIN_SECONDS have passed; new ones are told to go elsewhere.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from octad.engine.params import SamplingParams
from octad.errors import OctadError, RequestError
from octad.figures import percent
from octad.serve.limits import Limits, patient_protocol
from octad.serve.replies import ApiError
from octad.telling import Progress

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from octad.engine.llm import LLM

DRAIN_SECONDS = 60.0
log = logging.getLogger("octad.serve")


@dataclass
class ServerState:
    """loading, ready, draining, failed, or (in front of another server) unreachable; `active` requests are being
    answered."""

    status: str = "loading"
    stage: str = "starting"
    progress: float = 0.0
    active: int = 0
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.RLock, repr=False)  # a signal may come in the middle

    def become(self, status: str, stage: str, progress: float = 0.0) -> None:
        """Change; but a server that stops goes on stopping."""
        with self.lock:
            if self.status != "draining":
                self.status, self.stage, self.progress = status, stage, progress

    def health(self) -> tuple[int, dict[str, Any]]:
        """The answer of /health."""
        if self.status == "ready":
            return 200, {"status": "ok"}
        about: dict[str, Any] = {"status": self.status, "stage": self.stage}
        if self.status == "loading":
            about["progress"] = round(self.progress, 3)
        error = ApiError(503, self.why(), code=self.status)
        return 503, about | {"error": error.body()["error"]}

    def why(self) -> str:
        """Why nothing is answered now."""
        if self.status == "draining":
            return "the server is stopping; ask another one"
        if self.status == "failed":
            return f"the model could not be opened: {self.error}"
        if self.status == "unreachable":
            return f"the backend does not answer ({self.stage})"
        return f"the model is being opened ({self.stage}, {percent(self.progress)})"

    def check(self) -> None:
        """Raises ApiError 503 unless the server is ready."""
        if self.status != "ready":
            raise ApiError(503, self.why(), code=self.status, headers={"Retry-After": "2"})


def start_loading(
    state: ServerState, load: Callable[[Progress], LLM], ready: Callable[[LLM], None]
) -> threading.Thread:
    """Open the model on a thread of its own, make a first token, then call `ready` and say so."""

    def tell(stage: str, progress: float) -> None:
        """How far it is."""
        state.stage, state.progress = stage, progress

    def work() -> None:
        """The thread: whatever goes wrong ends in `state`."""
        try:
            llm = load(tell)
            tell("making a first token", 0.9)
            first = llm.tokenizer.bos_id or llm.tokenizer.eos_id or 0
            llm.submit([first], SamplingParams(max_tokens=1, temperature=0), deltas=False).output()
            with suppress(
                RequestError
            ):  # without llguidance, or end tokens: those who ask for a form hear of it
                llm.engine.grammars.read_vocabulary()
            ready(llm)
            state.become("ready", "ready", 1.0)
        except BaseException as error:
            state.error = " ".join(str(error).split())[:300]
            state.status = "failed"
            if not isinstance(error, OctadError):
                log.exception("the model could not be opened")
        finally:
            state.ended.set()

    thread = threading.Thread(target=work, name="octad load", daemon=True)
    thread.start()
    return thread


class DrainingServer(uvicorn.Server):
    """uvicorn's server; a first signal drains it, a second one ends it."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, drain_seconds: float = DRAIN_SECONDS
    ) -> None:
        super().__init__(config)
        self.state, self.drain_seconds = state, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """For signals."""
        if self.state.status == "draining" or sig == signal.SIGINT:
            self.should_exit = True
            self.force_exit = self.state.status == "draining"
        self.state.become("draining", "stopping")

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self.state.status == "failed":
            self.should_exit = True
        if self.state.status == "draining" and not self.should_exit:
            self._began = getattr(self, "_began", asyncio.get_running_loop().time())
            late = asyncio.get_running_loop().time() - self._began > self.drain_seconds
            # those who ask for the health must have had a chance to hear of it
            if late or (not self.state.active and asyncio.get_running_loop().time() - self._began > 1.0):
                self.should_exit = True
        return await super().on_tick(counter)


def server(
    app: ASGIApp, state: ServerState, limits: Limits, drain_seconds: float = DRAIN_SECONDS
) -> DrainingServer:
    """uvicorn around the application, with octad's protocol and signals."""
    config = uvicorn.Config(
        app,
        http=patient_protocol(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=limits.header_bytes,
        backlog=512,
    )
    return DrainingServer(config, state, drain_seconds)


def bind(host: str, port: int) -> socket.socket:
    """The open port. Raises RequestError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # on Windows it would let two servers have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        no_host = isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
        raise RequestError(
            f"--host {host} --port {port}: cannot be opened ({getattr(error, 'strerror', None) or error}); choose another"
            f" {'host: an address of this machine, or 0.0.0.0 for all' if no_host else 'port'}"
        ) from None
    made.listen(512)
    made.setblocking(False)
    return made
