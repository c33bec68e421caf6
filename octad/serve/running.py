"""What `octad serve` puts together: a front for octad's own engine, for another server, or for vLLM; and how it runs.

    served = own_engine("mixture", names, door, lambda: LLM("mixture"), max_queue=128)
    served = in_front_of("http://gpu:8000", door, model="mixture")
    run(served, bind("127.0.0.1", 8000))

The port is open and the page is there before a weight is read.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from socket import socket
from typing import TYPE_CHECKING, Any

from octad.checkpoint.load import open_source
from octad.checkpoint.provenance import Provenance
from octad.engine.opened import expert_names
from octad.errors import RequestError
from octad.report.terminal import life
from octad.serve.app import Application
from octad.serve.backend import Backend
from octad.serve.backend_app import BackendApplication
from octad.serve.child import Child
from octad.serve.front import Front
from octad.serve.lifecycle import server, start_loading
from octad.serve.listing import ModelNames
from octad.serve.make_up import make_up
from octad.serve.security import Access
from octad.serve.served_report import PATH, ServedReport

if TYPE_CHECKING:
    from octad.checkpoint.source import TensorSource
    from octad.engine.llm import LLM
    from octad.telling import Progress

log = logging.getLogger("octad.serve")
TURN = 0.001  # seconds after which the engine's thread lets the event loop have Python; a fifth of what it would be


def _nothing() -> None:
    """There is nothing to do."""


@dataclass(frozen=True)
class Served:
    """A front; what begins once its port is open, and what is done when it ends."""

    front: Front
    begin: Callable[[], object]
    end: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Door:
    """What all fronts have: who may ask, the seconds that an answer may take (None: any), the report that is shown."""

    access: Access
    seconds: float | None = None
    report: ServedReport | None = None

    def report_shown(self, front: Front, made: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Serve the report, and `made` with a link to it. A link carries no key, so with keys there is none."""
        if self.report is None or self.access.keys:
            return dict(made) if made is not None else None
        front.get(PATH, self.report.answer)
        found = dict(made or {})
        verdict = found.get("verdict") or {"headline": "The mixture was judged."}
        return found | {"verdict": verdict | {"report": PATH.lstrip("/")}}


def own_engine(
    model: str, names: list[str], door: Door, load: Callable[[], LLM], *, max_queue: int
) -> Served:
    """octad's engine; `load` opens it. Raises CheckpointError for a model that is not there or whose octad.json is
    damaged."""
    source = _opened(model)
    app = Application(ModelNames.now(names), door.access, max_queue=max_queue, timeout=door.seconds)

    def work(tell: Progress) -> LLM:
        """Opened on the loading thread."""
        tell("reading the weights", 0.1)
        return load()

    engines: list[LLM] = []

    def ready(llm: LLM) -> None:
        """Answers can be had: with the make-up beside them."""
        engines.append(llm)
        if llm.dtype_note:
            log.warning(llm.dtype_note)
        app.ready(llm, door.report_shown(app, make_up(source)))
        print("octad: ready", file=sys.stderr, flush=True)

    def end() -> None:
        for llm in engines:
            if (store := llm.expert_store) is not None and store.stats.tokens:
                log.warning(store.stats.line())

    return Served(app, lambda: start_loading(app.state, work, ready), end)


def in_front_of(
    url: str, door: Door, *, model: str | None = None, key: str | None = None, child: Child | None = None
) -> Served:
    """The server at `url`, or the `child` that listens there. `model`: the mixture that it serves, for names and
    make-up; its weights are not opened."""
    made: Mapping[str, Any] | None = None
    about: dict[str, Any] = {}
    if model is not None:
        source = _opened(model)
        config = source.config
        shape = (config.num_hidden_layers, config.num_experts_per_tok) if config.is_moe else (0, 0)
        about = {"names": expert_names(source.directory, config.num_experts), "shape": shape}
        made = make_up(source)
    stage = child.latest if child else None
    backend = Backend(url, key, pass_keys=not door.access.keys, seconds=door.seconds, stage=stage, **about)
    app = BackendApplication(backend, door.access)
    app.made = door.report_shown(app, made)

    def begin() -> None:
        backend.watch(app.state)
        if child is not None:
            child.start(app.state)

    def end() -> None:
        backend.ended.set()
        if child is not None:
            child.stop()

    return Served(app, begin, end)


def _opened(model: str) -> TensorSource:
    """A mistake in the name shows before the port is open, and so does a damaged octad.json."""
    source = open_source(model, quantised=True)
    Provenance.of(source)
    return source


def run(served: Served, opened: socket) -> None:
    """Until it is told to stop. Raises RequestError where the engine failed."""
    sys.setswitchinterval(TURN)
    front, place = served.front, opened.getsockname()
    shown = f"[{place[0]}]" if ":" in place[0] else place[0]
    print(f"octad: http://{shown}:{place[1]}/ is the chat page, /v1 the API", file=sys.stderr, flush=True)
    state = front.state
    try:
        served.begin()
        with life.doing(lambda: state.why() if state.status == "loading" else ""):
            asyncio.run(server(front.asgi, state, front.limits).serve([opened]))
    finally:
        served.end()
    if front.state.status == "failed":
        raise RequestError(front.state.error)


def log_to_stderr(*, requests: bool) -> None:
    """Requests as bare lines of JSON, everything else as lines that say what they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("octad: %(message)s"))
    logging.getLogger("octad.serve").addHandler(handler)
    bare, access = logging.StreamHandler(), logging.getLogger("octad.serve.access")
    bare.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(bare)
    access.propagate = False
    access.setLevel(logging.INFO if requests else logging.CRITICAL)
