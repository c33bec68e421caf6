"""What reads the files of more_seeds: GGUF, running models, plans, forms of answers, requests over HTTP.

MORE["float.gguf"].read(directory)
"""

import asyncio
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from more_seeds import PATHS

Read = Callable[[Path], object]


def gguf(name: str) -> Read:
    """A GGUF file: looked at, its vocabulary compared and at work, all tensors."""

    def read(d: Path) -> None:
        from octad.checkpoint.inspect import inspect
        from octad.checkpoint.load import load_tokenizer, open_source
        from octad.combine.tokens import read_tokens

        source = open_source(d / name)
        inspect(source)
        read_tokens(source)
        ids = load_tokenizer(source).encode("a river <|end|>", parse_special=True)
        load_tokenizer(source).decode(ids)
        for tensor in source.names():
            source.read(tensor)

    return read


def vocabulary_alone(d: Path) -> None:
    """A tokenizer inside GGUF."""
    from octad.checkpoint.gguf.header import GGUFHeader
    from octad.checkpoint.gguf.vocabulary import gguf_tokenizer

    found = gguf_tokenizer(GGUFHeader.read(d / "pieces.gguf"))
    found.decode(found.encode("hello the world"))
    assert len(found.byte_lengths) == found.vocab_size


def vocabulary(name: str) -> Read:
    """A vocabulary that is compared, and a tokenizer only where one can be made of it."""

    def read(d: Path) -> None:
        from octad.checkpoint.load import open_source
        from octad.combine.tokens import read_tokens

        read_tokens(open_source(d / name))

    return read


def answers(name: str) -> Read:
    """A model that runs: opened as `octad generate` does it, asked for four tokens."""

    def read(d: Path) -> None:
        from octad import LLM, SamplingParams

        llm = LLM(d / name, dtype="float32", device="cpu", num_blocks=20)
        llm.generate(["a river"], SamplingParams(max_tokens=4))
        if llm.tokenizer.chat_template:
            llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=2))

    return read


def made(d: Path) -> None:
    """What the server tells of a mixture, and what is written on from its card and history."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.card import may_write
    from octad.fast.precision import Precision
    from octad.fast.saved import card, plan_schemes
    from octad.serve.make_up import make_up
    from octad.train.learner import _earlier

    source = open_source(d / "mix")
    json.dumps(make_up(source)).encode()
    may_write(source, 64)
    card(source, "int8", plan_schemes(source.config, Precision.of("int8"), "mix")).encode()
    json.dumps(_earlier(source))


def dataset(d: Path) -> None:
    """What Dataset.save_to_disk wrote, as windows."""
    from octad.text.tokenizer import Tokenizer
    from octad.text.windows import read_windows

    read_windows([d / "dataset"], Tokenizer.from_directory(d / "base"), tokens=200, window=32)


def pretraining(d: Path) -> None:
    """A new model, its weights too."""
    from octad.train.pretrain import pretrain_learner
    from octad.train.run_config import PretrainConfig, load_config

    config = load_config(d / "pretrain.yaml")
    if isinstance(config, PretrainConfig):
        pretrain_learner(config)


def tuning(d: Path) -> None:
    """A model that is trained on."""
    from octad.train.learner import tune_learner
    from octad.train.run_config import TuneConfig, load_config

    config = load_config(d / "train.yaml")
    if isinstance(config, TuneConfig):
        tune_learner(config)


def plan(hardware: str, model: str) -> Read:
    """`octad plan`, both questions, as shown and as JSON."""

    def read(d: Path) -> None:
        from octad.cli.plan_view import render
        from octad.plan.hardware import find_cluster
        from octad.plan.reply import serve_answer, train_answer
        from octad.plan.shapes import readings

        own = d / "hardware.yaml"
        found, cluster = readings(str(d / model)), find_cluster(hardware, 1, own)
        trained = train_answer(found, cluster, tokens=1e9, window=64, batch=1e6)
        served = serve_answer(found, cluster, context=128, users=2, host=find_cluster("desktop", 1, own))
        for answer in (trained, served):
            json.dumps(answer)
            list(render(answer))

    return read


def form(name: str, field: str) -> Read:
    """The form that --schema, --grammar or --regex gives an answer, compiled and at work."""

    def read(d: Path) -> None:
        import torch

        from octad.engine.params import StructuredOutput
        from octad.engine.structured import GrammarCompiler
        from octad.guard import read_text
        from octad.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_directory(d / "base")
        spec = StructuredOutput(**{field: read_text(d / name)})
        matcher = GrammarCompiler(tokenizer, tokenizer.eos_ids).compile(spec)
        for _ in range(8):
            logits = torch.arange(float(tokenizer.vocab_size))
            matcher.mask(logits)
            matcher.accept(int(logits.argmax()))

    return read


def keys(d: Path) -> None:
    """Keys of a server."""
    from octad.serve.security import _keys

    _keys(d / "keys.txt")


def requirements(d: Path) -> None:
    """What --require says."""
    from octad.evaluate.requirements import parse
    from octad.guard import read_text

    parse(read_text(d / "require.txt"))


# ---- over HTTP -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _application(directory: Path, pid: int) -> Any:
    """The server's application in this process."""
    from octad import LLM
    from octad.serve.app import Application
    from octad.serve.limits import Limits
    from octad.serve.listing import ModelNames

    app = Application(ModelNames.now(["mixture"]), None, Limits(body_bytes=1 << 20))
    app.ready(LLM(directory / "talks", dtype="float32", device="cpu", num_blocks=100))
    return app.asgi


def request(name: str) -> Read:
    """A request's body: answered, or refused with a status below 500 and an error in JSON."""

    def read(d: Path) -> None:
        status, said = asyncio.run(
            _asked(_application(d, os.getpid()), PATHS[name], d / "bodies" / f"{name}.json")
        )
        if status != 200:
            from octad.errors import RequestError

            told = json.loads(said)["error"]
            assert 400 <= status < 500, (status, said[:300])
            raise RequestError(str(told["message"]))

    return read


async def _asked(app: Any, path: str, body: Path) -> tuple[int, bytes]:
    """One POST through ASGI, without a socket."""
    sent = [{"type": "http.request", "body": body.read_bytes(), "more_body": False}]
    found: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        found.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
             "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)}  # fmt: skip
    await app(scope, receive, send)
    status = next(m["status"] for m in found if m["type"] == "http.response.start")
    return status, b"".join(m.get("body", b"") for m in found if m["type"] == "http.response.body")


MORE: dict[str, tuple[str, Read]] = {
    "float.gguf": ("binary", gguf("float.gguf")),
    "rounded.gguf": ("binary", gguf("rounded.gguf")),
    "mixture.gguf": ("binary", answers("mixture.gguf")),
    "pieces.gguf": ("binary", vocabulary_alone),
    "pieces/tokenizer.json": ("json", vocabulary("pieces")),
    "bare/tokenizer.model": ("binary", vocabulary("bare")),
    "older/vocab.json": ("json", vocabulary("older")),
    "older/added_tokens.json": ("json", vocabulary("older")),
    "int4/config.json": ("json", answers("int4")),
    "int4/model.safetensors": ("binary", answers("int4")),
    "talks/config.json": ("json", answers("talks")),
    "talks/octad.json": ("json", answers("talks")),
    "talks/chat_template.jinja": ("text", answers("talks")),
    "qwen2_moe/config.json": ("json", answers("qwen2_moe")),
    "qwen3_moe/config.json": ("json", answers("qwen3_moe")),
    "qwen3_moe/generation_config.json": ("json", answers("qwen3_moe")),
    "olmoe/config.json": ("json", answers("olmoe")),
    "mix/README.md": ("text", made),
    "mix/octad.json": ("json", made),
    "mix/training.json": ("json", made),
    "dataset/state.json": ("json", dataset),
    "dataset/dataset_info.json": ("json", dataset),
    "dataset/data-*.arrow": ("binary", dataset),
    "pretrain.yaml": ("yaml", pretraining),
    "train.yaml": ("yaml", tuning),
    "hardware.yaml": ("yaml", plan("minex8", "planned.json")),
    "planned.yaml": ("yaml", plan("h100x8", "planned.yaml")),
    "planned.json": ("json", plan("h100x8", "planned.json")),
    "schema.json": ("json", form("schema.json", "json")),
    "grammar.lark": ("text", form("grammar.lark", "grammar")),
    "pattern.txt": ("text", form("pattern.txt", "regex")),
    "keys.txt": ("text", keys),
    "require.txt": ("text", requirements),
    **{f"bodies/{name}.json": ("json", request(name)) for name in PATHS},
}
