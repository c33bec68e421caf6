"""`octad serve`: the API and the chat page of one model, until it is told to stop."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octad.cli.options import Model, Quantize
from octad.errors import RequestError

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.serve.lifecycle import Tell


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any that is free.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be repeated.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Keys that clients need, one a line.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name that clients reach this server by; may be repeated.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may use the API; may be repeated.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that may wait; then 429.")
    ] = 128,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds an answer may take; 0: any.")
    ] = 0,
    quantize: Quantize = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_num_seqs: Annotated[int, typer.Option(min=1, metavar="N", help="Answers in progress at once.")] = 64,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens of prompt and answer.")
    ] = None,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Size of the key/value cache, GB.")] = None,
    log_requests: Annotated[
        bool, typer.Option("--log/--no-log", help="A line of JSON for each request.")
    ] = True,
) -> None:
    """Serve a model: the OpenAI and Anthropic APIs, and a chat page that shows who speaks."""
    _check_installed()
    import asyncio

    from octad.checkpoint.load import open_source
    from octad.checkpoint.provenance import Provenance
    from octad.serve.app import Application
    from octad.serve.lifecycle import bind, server, start_loading
    from octad.serve.listing import ModelNames
    from octad.serve.make_up import make_up
    from octad.serve.security import Access

    access = Access.of(host, allowed_host or (), cors or (), api_key_file)
    source = open_source(model, quantised=True)  # a mistake in the name shows before the port is open
    Provenance.of(source)  # and a damaged octad.json
    name = Path(model).resolve().name if Path(model).exists() else model
    app = Application(
        ModelNames.now(served_model_name or [name]),
        access,
        max_queue=max_queue,
        timeout=timeout or None,
    )
    options: dict[str, Any] = {"max_num_seqs": max_num_seqs, "max_model_len": max_model_len}

    def load(tell: Tell) -> LLM:
        from octad.engine.llm import LLM

        tell("reading the weights", 0.1)
        return LLM(model, dtype=dtype, device=device, quantize=quantize, kv_cache_gb=kv_cache_gb, **options)

    opened = bind(host, port)
    _log_to_stderr(requests=log_requests)
    place = opened.getsockname()
    shown = f"[{place[0]}]" if ":" in place[0] else place[0]
    print(f"octad: http://{shown}:{place[1]}/ is the chat page, /v1 the API", file=sys.stderr, flush=True)
    start_loading(app.state, load, lambda llm: app.ready(llm, make_up(source)))
    asyncio.run(server(app.asgi, app.state, app.limits).serve([opened]))
    if app.state.status == "failed":
        raise RequestError(app.state.error)


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise RequestError(f"serve: needs {', '.join(missing)}: pip install octad[serve]")


def _log_to_stderr(*, requests: bool) -> None:
    """Requests as bare lines of JSON, everything else as lines that say what they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("octad: %(message)s"))
    logging.getLogger("octad.serve").addHandler(handler)
    bare, access = logging.StreamHandler(), logging.getLogger("octad.serve.access")
    bare.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(bare)
    access.propagate = False
    access.setLevel(logging.INFO if requests else logging.CRITICAL)
