"""`octad serve`: the API and the chat page of one model, until it is told to stop; or in front of another server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octad.cli.options import Memory, Quantize, Verb, given, one_process, refuse_given
from octad.errors import RequestError

if TYPE_CHECKING:
    from octad.serve.running import Door, Served

Names = list[str] | None
MODEL = "A checkpoint, .gguf file, hub id or bundled base; with --backend, the mixture that it serves."
OF_LLM = (
    "quantize",
    "memory",
    "dtype",
    "device",
    "max_num_seqs",
    "max_model_len",
    "kv_cache_gb",
)  # LLM's arguments
OWN = ("max_queue", *OF_LLM)
SAME = {  # what vLLM calls those that it has
    "dtype": "--dtype",
    "max_num_seqs": "--max-num-seqs",
    "max_model_len": "--max-model-len",
}
_ADDRESS = typer.Option(help="Address to listen at.")
_PORT = typer.Option(min=0, max=65535, metavar="N", help="0: any that is free.")
_NAME = typer.Option(help="What clients call the model; may be repeated.")
_KEYS = typer.Option(help="Keys that clients need, one a line.")
_HOSTS = typer.Option(help="A name that clients reach this server by; may be repeated.")
_CORS = typer.Option(help="An origin whose pages may use the API; may be repeated.")
_QUEUE = typer.Option(min=0, metavar="N", help="Requests that may wait; then 429.")
_TIMEOUT = typer.Option(min=0, metavar="S", help="Seconds an answer may take; 0: any.")
_SEQS = typer.Option(min=1, metavar="N", help="Answers in progress at once.")
_LENGTH = typer.Option(min=1, metavar="N", help="Tokens of prompt and answer.")
_BACKEND = typer.Option(metavar="URL", help="Serve what another OpenAI server answers.")
_BACKEND_KEY = typer.Option(help="The key for it; else clients' keys are passed on.")
_ENGINE = typer.Option(help="octad, or vllm (its own options may follow).")
_PYTHON = typer.Option(help="The python of vLLM's environment.")
_REPORT = typer.Option(help="What octad evaluate --report wrote; else MODEL-report.")
_LOG = typer.Option("--log/--no-log", help="A line of JSON for each request.")


class EngineCommand(Verb):
    """Takes options that it does not know where they are another engine's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """click's, which reads these two flags."""
        at = args.index("--engine") + 1 if "--engine" in args else len(args)
        foreign = args[at : at + 1] == ["vllm"] or "--engine=vllm" in args
        ctx.ignore_unknown_options = ctx.allow_extra_args = foreign
        return super().parse_args(ctx, args)


def serve(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(help=MODEL)] = None,
    host: Annotated[str, _ADDRESS] = "127.0.0.1",
    port: Annotated[int, _PORT] = 8000,
    served_model_name: Annotated[Names, _NAME] = None,
    api_key_file: Annotated[Path | None, _KEYS] = None,
    allowed_host: Annotated[Names, _HOSTS] = None,
    cors: Annotated[Names, _CORS] = None,
    max_queue: Annotated[int, _QUEUE] = 128,
    timeout: Annotated[float, _TIMEOUT] = 0,
    quantize: Quantize = None,
    memory: Memory = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_num_seqs: Annotated[int, _SEQS] = 64,
    max_model_len: Annotated[int | None, _LENGTH] = None,
    kv_cache_gb: Annotated[float | None, typer.Option(help="Size of the key/value cache, GB.")] = None,
    backend: Annotated[str | None, _BACKEND] = None,
    backend_key_file: Annotated[Path | None, _BACKEND_KEY] = None,
    engine: Annotated[str, _ENGINE] = "octad",
    vllm_python: Annotated[Path | None, _PYTHON] = None,
    report: Annotated[Path | None, _REPORT] = None,
    log_requests: Annotated[bool, _LOG] = True,
) -> None:
    """Serve a model: the OpenAI and Anthropic APIs, and a chat page that shows who speaks."""
    _check_installed()
    _check_options(ctx, model, backend, engine)
    from octad.cli.quick_start import quick_start
    from octad.fast.beginning import begin, may_begin

    own = backend is None and engine == "octad" and memory is None
    begun = begin(str(model), quantize) if own and may_begin(dtype, device) else None
    quick_start()
    from octad.serve.lifecycle import bind
    from octad.serve.running import Door, log_to_stderr, run
    from octad.serve.security import Access
    from octad.serve.served_report import find_report

    access = Access.of(host, allowed_host or (), cors or (), api_key_file)
    door = Door(access, timeout or None, find_report(model or "", report))
    if backend is not None:
        served = _backend(backend, backend_key_file, model, door)
    elif engine == "vllm":
        served = _vllm(ctx, str(model), served_model_name, vllm_python, door)
    else:
        options: dict[str, Any] = {name: ctx.params[name] for name in OF_LLM} | {"begun": begun}
        served = _octad(str(model), served_model_name, door, max_queue, options)
    opened = bind(host, port)
    log_to_stderr(requests=log_requests)
    run(served, opened)


def _backend(url: str, key_file: Path | None, model: str | None, door: Door) -> Served:
    from octad.serve.backend import key_of
    from octad.serve.running import in_front_of

    return in_front_of(url, door, model=model, key=key_of(key_file))


def _octad(model: str, names: Names, door: Door, max_queue: int, options: dict[str, Any]) -> Served:
    from octad.serve.running import own_engine

    one_process("serve")
    from octad.engine.llm import LLM
    from octad.engine.opened import Opened

    begun = options.pop("begun")
    opened = Opened.of(model, **options)  # what cannot be is said before there is a page

    def load() -> LLM:
        return LLM.of(opened, begun)

    return own_engine(model, names or [_name(model)], door, load, max_queue=max_queue)


def _vllm(ctx: typer.Context, model: str, names: Names, python: Path | None, door: Door) -> Served:
    from octad.checkpoint.load import open_source
    from octad.serve.child import Child, vllm_command
    from octad.serve.running import in_front_of

    if names and len(names) > 1:
        raise RequestError("--served-model-name: with --engine vllm there can be one")
    options = [*ctx.args]
    for name in given(ctx, list(SAME)):
        options += [SAME[name], str(ctx.params[name])]
    routed = open_source(model, quantised=True).config.is_moe
    name = names[0] if names else _name(model)
    child = Child(vllm_command(model, python=python, name=name, options=options, routed=routed))
    return in_front_of(child.url, door, model=model, key=child.key, child=child)


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _check_options(ctx: typer.Context, model: str | None, backend: str | None, engine: str) -> None:
    """Raises RequestError for options that do not go together: what has no effect is refused."""
    if engine not in ("octad", "vllm"):
        raise RequestError(f"--engine: found {engine!r}, allowed: octad, vllm")
    if backend is not None and engine == "vllm":
        raise RequestError("--backend: is for a server that runs; --engine vllm starts one; give one of both")
    if model is None and backend is None:
        raise RequestError("Missing argument 'MODEL'.")
    if model is not None and model.startswith("-"):
        raise RequestError(f"{model}: options of vLLM stand behind the model")
    useless: list[str] = []
    if backend is not None:
        useless = [*OWN, "served_model_name"]
    elif engine == "vllm":
        useless = [name for name in OWN if name not in SAME]
    place = "--backend" if backend is not None else "--engine vllm"
    if engine != "vllm":
        useless.append("vllm_python")
        place = place if backend is not None else "--engine octad"
    if backend is None:
        useless.append("backend_key_file")
    refuse_given(ctx, useless, f": has no effect with {place}; leave it out")


def _check_installed() -> None:
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "prometheus_client", "httpx2")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise RequestError(f"serve: needs {', '.join(missing)}: pip install 'octad[serve]'")
