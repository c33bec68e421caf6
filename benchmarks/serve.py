"""The server under 1, 4 and 16 chats at once, beside other servers and beside its own engine without a server.

    python benchmarks/serve.py demo-output --quantize int8 \
        --llama-server llama.cpp/build/bin/llama-server --gguf mixture-q8_0.gguf [--vllm vllm/bin/vllm]

All servers stand ready from the beginning; in each round, for each number of chats, each of them answers the same
questions in turn, so that whatever else the machine does meets all of them. Prompts are short, middling and long, answers
of 32 to 64 tokens (the same for all: an end token does not end them), greedy, streamed. A prompt begins with a number of
its own, so that no cache helps. `bare` is the engine in a process of its own, without HTTP, JSON or text on the way out.

Reported are, over all rounds: answers' tokens per second of wall clock, the time to the first piece, and the time between
pieces (medians and the 95th of 100); per number of chats octad against the better peer, and what serving costs over the
bare engine. Equal bits are the caller's choice: int8 beside q8_0. Takes about four minutes on two cores with the demo's
mixture. Ends with one line of JSON, which is kept in --out after every set.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clients import Answer, Server, ask, free_port
from measure import command_line, hardware, save, tell

SETS = {1: 1, 4: 2, 16: 1}  # chats at once: turns that each of them takes
ROUNDS = 3
CONTEXT = 1024
LENGTHS = ((8, 32), (60, 48), (220, 64))  # words of a prompt, tokens of its answer
TEXT = "The river ran past the mill where the children counted boats, and nobody knew why it had turned so cold. "
Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


def question(number: int, turn: int) -> dict[str, Any]:
    """A chat of its own: no two begin alike."""
    words, tokens = LENGTHS[number % len(LENGTHS)]
    text = " ".join((TEXT * 20).split()[:words])
    return {
        "messages": [{"role": "user", "content": f"{turn} {number}. Go on: {text}"}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def one_set(chats: int, turn: int, put: Ask) -> dict[str, Any]:
    """So many chats at once, each taking its turns one after the other."""

    async def chat(number: int) -> list[Answer]:
        turns = SETS[chats] * (3 if chats == 1 else 1)  # one of each length where there is one chat
        return [await put(question(number + at, turn * 100 + at)) for at in range(turns)]

    begun = time.perf_counter()
    answers = [answer for found in await asyncio.gather(*map(chat, range(chats))) for answer in found]
    seconds = time.perf_counter() - begun
    for answer in answers:
        if answer.error or not answer.times:
            sys.exit(f"a chat was not answered: {answer.status} {answer.error}")
    return {
        "seconds": seconds,
        "tokens": sum(answer.usage["completion_tokens"] for answer in answers),
        "prompt_tokens": sum(answer.usage["prompt_tokens"] for answer in answers),
        "first": [answer.times[0] for answer in answers],
        "between": [
            b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)
        ],
    }


def part(values: list[float], share: float) -> float:
    """The value that `share` of all are at most."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summary(sets: list[dict[str, Any]]) -> dict[str, float]:
    """Of one server and number of chats, over all rounds."""
    first = [value for one in sets for value in one["first"]]
    between = [value for one in sets for value in one["between"]]
    rates = [one["tokens"] / one["seconds"] for one in sets]
    return {
        "tokens_per_second": round(statistics.median(rates), 2),
        "slowest_round": round(min(rates), 2),
        "fastest_round": round(max(rates), 2),
        "first_p50_ms": round(1e3 * part(first, 0.5), 1),
        "first_p95_ms": round(1e3 * part(first, 0.95), 1),
        "between_p50_ms": round(1e3 * part(between, 0.5), 2),
        "between_p95_ms": round(1e3 * part(between, 0.95), 2),
        "tokens": sum(one["tokens"] for one in sets),
        "prompt_tokens": sum(one["prompt_tokens"] for one in sets),
    }


# ---- the engine alone --------------------------------------------------------------------------------------


def bare(model: str, quantize: str | None, threads: int | None) -> None:
    """In a process of its own: a line with chats and turn in, a line of JSON out."""
    import torch

    from octad.engine.llm import LLM
    from octad.engine.params import SamplingParams

    if threads:
        torch.set_num_threads(threads)
    llm = LLM(model, quantize=quantize, max_num_seqs=64)

    async def put(body: dict[str, Any]) -> Answer:
        begun, answer = time.perf_counter(), Answer(200)
        ids = llm.tokenizer.encode_chat(body["messages"])
        params = SamplingParams(max_tokens=body["max_tokens"], temperature=0, ignore_eos=True)
        stream, count = llm.loop.submit(ids, params), 0
        async for delta in stream:
            count += len(delta.token_ids)
            if delta.text:
                answer.times.append(time.perf_counter() - begun)
        answer.usage = {"completion_tokens": count, "prompt_tokens": len(ids)}
        return answer

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        chats, turn = json.loads(line)
        print(json.dumps(asyncio.run(one_set(chats, turn, put))), flush=True)


class Bare:
    """The engine alone, as a child."""

    name = "bare"

    def __init__(self, model: str, quantize: str | None, threads: int | None) -> None:
        command = [sys.executable, __file__, model, "--bare", *(["--quantize", quantize] if quantize else [])]
        command += ["--threads", str(threads)] if threads else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("the bare engine ended")

    def run(self, chats: int, turn: int) -> dict[str, Any]:
        """One set."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([chats, turn]) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = self._read()
        return found

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# ---- servers -----------------------------------------------------------------------------------------------


def servers(known: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """(name, port, command) of octad and of the peers that are asked for."""
    threads = ["-t", str(known.threads), "-tb", str(known.threads)] if known.threads else []
    bits = ["--quantize", known.quantize] if known.quantize else []
    port = free_port()
    found = [
        (
            "octad",
            port,
            [sys.executable, "-m", "octad", "serve", known.model, "--port", str(port), "--no-log", *bits],
        )
    ]
    if known.llama_server:
        port = free_port()
        command = [known.llama_server, "-m", known.gguf, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", "16", "-c", str(16 * CONTEXT), "--no-webui", *threads]
        found.append(("llama-server", port, command))
    if known.vllm:
        port = free_port()
        command = [known.vllm, "serve", known.model, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", "m", "--max-model-len", str(CONTEXT), *known.vllm_options.split()]
        found.append(("vllm", port, command))
    return found


def over_http(port: int, model: str) -> Ask:
    """A chat with the server at `port`."""

    async def put(body: dict[str, Any]) -> Answer:
        return await ask(port, body | {"model": model})

    return put


def compared(found: dict[str, dict[int, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Summaries, and octad beside the better peer and its own engine."""
    table = {
        name: {chats: summary(sets) for chats, sets in rows.items() if sets} for name, rows in found.items()
    }
    verdict = {}
    for chats, own in table["octad"].items():
        rate = own["tokens_per_second"]
        peers = {
            name: row[chats] for name, row in table.items() if name not in ("octad", "bare") and chats in row
        }
        told: dict[str, Any] = {}
        if peers:
            best = max(peers, key=lambda name: peers[name]["tokens_per_second"])
            told["better peer"] = best
            told["times its tokens per second"] = round(rate / peers[best]["tokens_per_second"], 3)
            for figure in ("first_p50_ms", "first_p95_ms", "between_p50_ms", "between_p95_ms"):
                told[f"{figure}, octad to the best"] = round(
                    own[figure] / min(p[figure] for p in peers.values()), 3
                )
        if chats in table.get("bare", {}):
            told["cost over the bare engine"] = round(1 - rate / table["bare"][chats]["tokens_per_second"], 4)
        verdict[chats] = told
    return {"servers": table, "verdict": verdict}


def main() -> None:
    """Start all, take turns, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--quantize")
    parser.add_argument(
        "--threads", type=int, help="of llama-server and the bare engine; octad takes all cores"
    )
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    parser.add_argument("--vllm", help="vLLM's executable")
    parser.add_argument("--vllm-options", default="--dtype float32 --max-num-seqs 16")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chats", type=int, nargs="+", default=list(SETS))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "results" / "serve.json"
    )
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.llama_server and not known.gguf:
        parser.error("--llama-server needs --gguf")
    if known.bare:
        bare(known.model, known.quantize, known.threads)
        return
    about = {"command": command_line(), "quantize": known.quantize, "threads": known.threads}
    results = about | measured(known, Path(tempfile.mkdtemp(prefix="octad-bench-")))
    save(known.out, results)
    print(json.dumps(results))


def measured(known: argparse.Namespace, logs: Path) -> dict[str, Any]:
    """Everything that is reported."""
    with ExitStack() as stack:
        runs: dict[str, Callable[[int, int], dict[str, Any]]] = {}
        started: dict[str, float] = {}
        for name, port, command in servers(known):
            server = stack.enter_context(Server(name, command, port, logs / f"{name}.log"))
            started[name] = round(server.wait(600), 2)
            tell(f"{name} is ready after {started[name]} s")
            model = Path(known.model).resolve().name if name == "octad" else "m"
            put = over_http(port, model)
            runs[name] = lambda chats, turn, put=put: asyncio.run(one_set(chats, turn, put))  # type: ignore[misc]
        engine = stack.enter_context(Bare(known.model, known.quantize, known.threads))
        runs["bare"] = engine.run
        found = in_turns(runs, known)
        results = {"ready_after_seconds": started, "rounds": known.rounds, "hardware": hardware()}
        return results | compared(found)


def in_turns(
    runs: dict[str, Callable[[int, int], dict[str, Any]]], known: argparse.Namespace
) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Every server's sets; who begins changes from round to round. The first, which is not counted, warms up."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {name: {c: [] for c in known.chats} for name in runs}
    names = list(runs)
    for name in names:
        runs[name](min(known.chats), 0)
    for turn in range(1, known.rounds + 1):
        for chats in known.chats:
            for name in names:
                one = runs[name](chats, turn)
                found[name][chats].append(one)
                tell(f"round {turn}, {chats} chats, {name}: {one['tokens'] / one['seconds']:.1f} tokens/s")
        names = [*names[1:], names[0]]
    return found


if __name__ == "__main__":
    main()
