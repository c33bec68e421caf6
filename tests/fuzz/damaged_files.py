"""The files that octad reads, each with what reads it: one small world of them, and a function for each kind of file.

seeds(directory)              # makes the world; needs transformers, peft and a few seconds
READERS["recipe.yaml"].read(directory)
"""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("helpers", "kill", ".")]
sys.path[:0] = [str(Path(__file__).parent)]

from more_readers import MORE  # noqa: E402
from more_seeds import more_seeds  # noqa: E402


@dataclass(frozen=True)
class Reader:
    """A kind of damage ("json", "yaml", "text", "binary") and what reads the file."""

    kind: str
    read: Callable[[Path], object]


def seeds(directory: Path) -> None:
    """Everything that the readers read, whole."""
    import gzip

    import pyarrow as pa
    import torch
    import zstandard
    from members import VOCABULARY, save_tokenizer
    from pyarrow import parquet
    from tiny_models import make_model
    from world import make

    from octad.chat import transcript
    from octad.combine.build import combine
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe
    from octad.evaluate.results import Cache, Record
    from octad.fast.saved import save_quantized
    from octad.train.learner import tune_learner
    from octad.train.run_config import load_config
    from octad.train.trainer import Trainer

    make(directory)
    from octad.checkpoint.load import open_source

    combine(preflight(Recipe.load(directory / "recipe.yaml")), directory / "mix")
    save_quantized(open_source(directory / "mix"), directory / "int8", "int8")
    sharded = make_model("llama", vocab_size=VOCABULARY, num_hidden_layers=1)
    sharded.save_pretrained(directory / "shards", max_shard_size="20KB")
    save_tokenizer(directory / "shards")
    shutil.copytree(directory / "base", directory / "chat")
    (directory / "chat" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    )
    (directory / "chat" / "generation_config.json").write_text('{"eos_token_id": [256], "temperature": 0.7}')
    trainer = Trainer(tune_learner(load_config(directory / "train.yaml")), directory / "run")
    (directory / "run").mkdir()
    trainer.save()
    with (directory / "run" / "log.jsonl").open("w") as log:
        log.writelines(json.dumps({"step": n, "bits_per_byte": {"one": 2.0}}) + "\n" for n in range(4))
    rows = [json.loads(line) for line in (directory / "text-1.jsonl").read_text().splitlines()]
    text = "".join(row["text"] + "\n" for row in rows)
    chats = [
        {"messages": [{"role": "user", "content": r["text"]}, {"role": "assistant", "content": "b"}]}
        for r in rows
    ]
    (directory / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (directory / "list.json").write_text(json.dumps(rows))
    (directory / "plain.txt").write_text(text)
    (directory / "table.csv").write_text(
        "id,text\n" + "".join(f'{n},"{r["text"]}"\n' for n, r in enumerate(rows))
    )
    lines = (directory / "text-1.jsonl").read_bytes()
    (directory / "packed.jsonl.gz").write_bytes(gzip.compress(lines))
    (directory / "packed.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(pa.table({"text": [r["text"] for r in rows]}), directory / "rows.parquet")
    (directory / "choice.yaml").write_text(
        'kind: choice\ntemplate: "Q: {question}\\nA:"\nseparator: " "\nexamples:\n'
        "  - {question: a, choices: [x, y], answer: 0}\n  - {question: b, choices: [x, y], answer: y}\n"
    )
    (directory / "generate.yaml").write_text(
        'kind: generate\nmax_tokens: 8\nstop: ["\\n"]\nmatch: exact\nexamples:\n'
        '  - {prompt: a, answers: [x, y]}\n  - {prompt: b, regex: "a+b"}\n'
    )
    (directory / "task.jsonl").write_text(
        '{"prompt": "a", "answers": ["x"]}\n{"prompt": "b", "regex": "a+b"}\n'
    )
    transcript.write(directory / "talk.json", "mix", "Be brief.", [transcript.Turn("a", "b")])
    more_seeds(directory)
    cache = Cache(directory / "cache")
    cache.put("key", Record(torch.zeros(5), {"seconds": 1.0}))
    cache.put_plain("key", {"a": [1, 2]})


# ---- what reads them -----------------------------------------------------------------------------------------


def model(name: str) -> Callable[[Path], object]:
    """A model's directory: opened, looked at, its tokenizer at work."""

    def read(d: Path) -> None:
        from octad.checkpoint.inspect import inspect
        from octad.checkpoint.load import open_source

        inspect(open_source(d / name, quantised=True))
        tokenizer(name)(d)

    return read


def tokenizer(name: str) -> Callable[[Path], object]:
    """Text and chats there and back, and the files that are written."""

    def read(d: Path) -> None:
        from octad.text.tokenizer import Tokenizer

        found = Tokenizer.from_directory(d / name)
        ids = found.encode("a river <|end|>", add_special_tokens=True, parse_special=False)
        found.decode(ids)
        if found.chat_template:
            found.encode_chat([{"role": "user", "content": "a"}])
        for text in found.files().values():
            text.encode()
        assert len(found.byte_lengths) == found.vocab_size

    return read


def mixture(d: Path) -> None:
    """A mixture as `octad expert` opens it."""
    from octad.combine.editable import EditableMixture

    EditableMixture.open(d / "mix")


def adapter(d: Path) -> None:
    """An adapter, and every tensor that it changes."""
    from octad.checkpoint.load import open_member, open_source

    member = open_member(d / "lora", open_source(d / "base"))
    for name in member.names():
        member.read(name)


def weights(d: Path) -> None:
    """A model's tensors."""
    from octad.checkpoint.load import open_source

    source = open_source(d / "shards")
    for name in source.names():
        source.read(name)


def rounded(d: Path) -> None:
    """A quantised model, ready to run."""
    import torch

    from octad.checkpoint.load import open_source
    from octad.checkpoint.quantized import QuantizedSource
    from octad.fast.held import load_quantized

    source = open_source(d / "int8", quantised=True)
    if isinstance(source, QuantizedSource):
        load_quantized(source, torch.float32)


def recipe(d: Path) -> None:
    """All of the pre-flight but the measuring."""
    from octad.combine.preflight import preflight
    from octad.combine.recipe import Recipe

    preflight(Recipe.load(d / "recipe.yaml"), d / "out", measure=False)


def training(name: str) -> Callable[[Path], object]:
    """A training file and the text that it names."""

    def read(d: Path) -> None:
        from octad.text.corpus import open_documents
        from octad.train.run_config import BranchConfig, load_branch, load_config

        config = load_branch(d / name) if name.startswith("branch") else load_config(d / name)
        list(config.unused_keys())
        parts = config.experts if isinstance(config, BranchConfig) else config.data.sources
        for part in parts:
            for file in part.data:
                next(open_documents(config.resolve(file)).read(part.field, 10), None)

    return read


def domains(d: Path) -> None:
    """What a model is judged on."""
    from octad.checkpoint.load import open_source
    from octad.evaluate.domains import read_domains
    from octad.evaluate.heldout import read_texts

    read_texts(open_source(d / "base"), read_domains(d / "domains.yaml"), tokens=64, window=32)


def task(name: str) -> Callable[[Path], object]:
    """A task's file."""

    def read(d: Path) -> None:
        from octad.evaluate.tasks.task import read_task

        read_task(d / name)

    return read


def text(name: str) -> Callable[[Path], object]:
    """Text as windows."""

    def read(d: Path) -> None:
        from octad.text.tokenizer import Tokenizer
        from octad.text.windows import read_windows

        read_windows([d / name], Tokenizer.from_directory(d / "chat"), tokens=200, window=32)

    return read


def shard(d: Path) -> None:
    """The token cache: damaged, it is made again, to the same tokens."""
    from octad.dist import World
    from octad.text.tokenizer import Tokenizer
    from octad.train.shares import open_shard

    files = [d / "text-0.jsonl"]
    found = open_shard(World(), files, Tokenizer.from_directory(d / "base"), cache=d / "tokens")
    again = open_shard(World(), files, Tokenizer.from_directory(d / "base"), cache=d / "other-tokens")
    assert found.tokens.tolist() == again.tokens.tolist()
    assert found.starts.tolist() == again.starts.tolist()


def state(d: Path) -> None:
    """A run's state."""
    from octad.train.state import latest_state, load_facts, read_masters

    if (found := latest_state(d / "run")) is not None:
        load_facts(found)
        read_masters(found)


def log(d: Path) -> None:
    """A run's log, drawn."""
    from octad.train.routing_plot import draw_run

    draw_run(d / "run")


def talk(d: Path) -> None:
    """A saved conversation."""
    from octad.chat import transcript

    transcript.read(d / "talk.json")


def kept(d: Path) -> None:
    """What evaluate keeps: whole or not at all."""
    from octad.evaluate.results import Cache

    cache = Cache(d / "cache")
    record, plain = cache.get("key"), cache.get_plain("key")
    assert record is None or record.nats.tolist() == [0.0] * 5
    assert plain in (None, {"a": [1, 2]})


STATE = "run/states/step-00000000"
READERS = {
    "base/config.json": Reader("json", model("base")),
    "base/model.safetensors": Reader("binary", model("base")),
    "mix/config.json": Reader("json", model("mix")),
    "mix/octad.json": Reader("json", mixture),
    "mix/router_statistics.octad": Reader("binary", mixture),
    "int8/config.json": Reader("json", rounded),
    "int8/model.safetensors": Reader("binary", rounded),
    "shards/model.safetensors.index.json": Reader("json", weights),
    "base/tokenizer.json": Reader("json", tokenizer("base")),
    "base/tokenizer_config.json": Reader("json", tokenizer("base")),
    "chat/generation_config.json": Reader("json", tokenizer("chat")),
    "chat/chat_template.jinja": Reader("text", tokenizer("chat")),
    "lora/adapter_config.json": Reader("json", adapter),
    "lora/adapter_model.safetensors": Reader("binary", adapter),
    "recipe.yaml": Reader("yaml", recipe),
    "train.yaml": Reader("yaml", training("train.yaml")),
    "branch.yaml": Reader("yaml", training("branch.yaml")),
    "domains.yaml": Reader("yaml", domains),
    "choice.yaml": Reader("yaml", task("choice.yaml")),
    "generate.yaml": Reader("yaml", task("generate.yaml")),
    "task.jsonl": Reader("json", task("task.jsonl")),
    "text-1.jsonl": Reader("text", text("text-1.jsonl")),
    "chats.jsonl": Reader("text", text("chats.jsonl")),
    "list.json": Reader("json", text("list.json")),
    "plain.txt": Reader("text", text("plain.txt")),
    "table.csv": Reader("text", text("table.csv")),
    "packed.jsonl.gz": Reader("binary", text("packed.jsonl.gz")),
    "packed.jsonl.zst": Reader("binary", text("packed.jsonl.zst")),
    "rows.parquet": Reader("binary", text("rows.parquet")),
    "tokens/*/tokens.npy": Reader("binary", shard),
    "tokens/*/starts.npy": Reader("binary", shard),
    "tokens/*/digests.json": Reader("json", shard),
    f"{STATE}/state.json": Reader("json", state),
    f"{STATE}/state.safetensors": Reader("binary", state),
    "run/log.jsonl": Reader("text", log),
    "talk.json": Reader("json", talk),
    "cache/key.json": Reader("json", kept),
    "cache/key.safetensors": Reader("binary", kept),
}
READERS |= {
    name if name not in READERS else f"{name} again": Reader(kind, read)
    for name, (kind, read) in MORE.items()
}
