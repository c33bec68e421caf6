"""Many clients for a long time, some of them rude: no answer wrong, mixed up or lost, no memory or block kept.

    python benchmarks/soak.py demo-output --minutes 10 --clients 64 [--quantize int8]

First each question is answered alone, greedily. Then the clients ask them all at once, over and over: whole and streamed,
some reading slowly, some leaving at a random moment (before the first byte, in the middle, of streams and of whole
answers), some with prompts that are too long, wrong keys, or bodies that are no JSON. Every whole answer must be the one
that the question got alone. /health is asked ten times a second. At the end nothing may run or wait, every block of the
cache must be free, and the server's memory must not have grown after the first quarter of the time.
Ends with one line of JSON, kept in --out, and with status 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from clients import Answer, Server, ask, free_port
from measure import command_line, hardware, save, tell

KEY = "the-soak's-own-key"
WORDS = re.findall(
    r"\S+", "tell me more about the river, a function of x, la mer, prime numbers, winter, bread, a poem"
)
DEEDS = {"whole": 20, "stream": 40, "slow": 8, "leave": 20, "long": 4, "key": 4, "broken": 4}
SLOWEST_HEALTH = 1.0
GROWTH = 1.05  # of the memory after the first quarter


def questions(count: int) -> list[dict[str, Any]]:
    """Conversations of mixed lengths, the same at every run."""
    draw = random.Random(1)
    found = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.choice((4, 12, 40, 90))))
        message = {"role": "user", "content": f"{number}: {text}"}
        found.append({"messages": [message], "temperature": 0, "max_tokens": draw.choice((4, 12, 30))})
    return found


class Soak:
    """The clients, and what they found."""

    def __init__(self, port: int, asked: list[dict[str, Any]], expected: list[str], context: int) -> None:
        self.port, self.asked, self.expected, self.context = port, asked, expected, context
        self.deeds, self.wrong = Counter[str](), list[str]()
        self.health: list[float] = []
        self.memory: list[tuple[float, int]] = []

    async def client(self, number: int, end: float) -> None:
        """One client, until the time is over."""
        draw = random.Random(number)
        names, weights = list(DEEDS), list(DEEDS.values())
        while time.monotonic() < end:
            deed, which = draw.choices(names, weights)[0], draw.randrange(len(self.asked))
            try:
                await asyncio.wait_for(self._do(deed, which, draw), 300)
            except (OSError, EOFError, TimeoutError) as error:
                self.wrong.append(f"{deed}: {type(error).__name__} {error}"[:200])
            self.deeds[deed] += 1

    async def _do(self, deed: str, which: int, draw: random.Random) -> None:
        body = self.asked[which] | {"stream": deed != "whole" and (deed != "leave" or draw.random() < 0.7)}
        if deed == "leave":
            await self._leave(body, draw)
        elif deed in ("whole", "stream", "slow"):
            await self._answered(body, which, pause=0.05 if deed == "slow" else 0.0)
        else:
            await self._refused(deed, body)

    async def _answered(self, body: dict[str, Any], which: int, pause: float) -> None:
        while True:
            answer = await ask(self.port, body, key=KEY, pause=pause)
            if answer.status != 429:
                break
            self.deeds["asked again after 429"] += 1
            await asyncio.sleep(1)
        if answer.status != 200 or not answer.done or answer.error:
            self.wrong.append(f"lost: {answer.status} {answer.error}"[:300])
        elif answer.text != self.expected[which]:
            self.wrong.append(f"question {which}: {answer.text!r} for {self.expected[which]!r}"[:500])

    async def _leave(self, body: dict[str, Any], draw: random.Random) -> None:
        """Before the first byte, or after some pieces."""
        pieces = draw.choice((0, 0, 1, 3, 8))

        def leave(answer: Answer) -> bool:
            return len(answer.times) >= pieces

        patience = draw.uniform(0.0, 1.5)
        try:
            await asyncio.wait_for(ask(self.port, body, key=KEY, leave=leave), patience)
        except TimeoutError:
            self.deeds["left while waiting"] += 1

    async def _refused(self, deed: str, body: dict[str, Any]) -> None:
        expected: dict[str, tuple[int, Any]] = {
            "long": (400, "context_length_exceeded"),
            "key": (401, "invalid_api_key"),
            "broken": (400, "invalid_json"),
        }
        sent: dict[str, Any] | bytes = body
        if deed == "long":
            sent = body | {"messages": [{"role": "user", "content": "many words " * self.context}]}
        elif deed == "broken":
            sent = json.dumps(body).encode()[:-3]
        answer = await ask(self.port, sent, key="wrong" if deed == "key" else KEY)
        if (answer.status, answer.error.get("code")) != expected[deed]:
            self.wrong.append(f"{deed}: {answer.status} {answer.error}"[:300])

    async def watch(self, server: Server, end: float) -> None:
        """Health ten times a second, memory once."""
        loop, ticks = asyncio.get_running_loop(), 0
        while time.monotonic() < end:
            begun = time.perf_counter()
            status = await loop.run_in_executor(None, self._get, "/health")
            self.health.append(time.perf_counter() - begun)
            if status != 200:
                self.wrong.append(f"/health: {status}")
            if ticks % 10 == 0:
                self.memory.append((time.monotonic(), server.resident()))
            ticks += 1
            await asyncio.sleep(0.1)

    def _get(self, path: str) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return int(answer.status)

    async def run(self, server: Server, clients: int, seconds: float) -> None:
        """Everybody at once."""
        end = time.monotonic() + seconds
        await asyncio.gather(self.watch(server, end), *(self.client(n, end) for n in range(clients)))


def metrics(port: int) -> dict[str, float]:
    """The server's gauges."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    lines = urllib.request.urlopen(request, timeout=10).read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("octad:"))
    return {name.partition("{")[0]: float(value) for name, value in pairs}


def left_behind(port: int) -> dict[str, float]:
    """What is still there when nobody asks any more; a few seconds are allowed."""
    names = ("octad:num_requests_running", "octad:num_requests_waiting", "octad:kv_cache_usage_perc")
    for _ in range(50):
        found = {name.removeprefix("octad:"): value for name, value in metrics(port).items() if name in names}
        if not any(found.values()):
            break
        time.sleep(0.2)
    return found


def grown(memory: list[tuple[float, int]]) -> tuple[float, float]:
    """MB after the first quarter of the time (its median to the half), and in the last quarter."""
    sizes = [size / 1e6 for _, size in memory]
    quarter = max(1, len(sizes) // 4)
    return statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])


async def alone(port: int, asked: list[dict[str, Any]]) -> list[str]:
    """Each question's answer when nobody else asks."""
    found = []
    for body in asked:
        answer = await ask(port, body, key=KEY)
        if answer.status != 200:
            sys.exit(f"a question was not answered: {answer.status} {answer.error}")
        found.append(answer.text)
    return found


def main() -> None:
    """Start, soak, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "soak.json")
    known, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        keys, port = Path(scratch) / "keys", free_port()
        keys.write_text(KEY + "\n")
        command = [sys.executable, "-m", "octad", "serve", known.model, "--port", str(port), "--no-log"]
        command += ["--api-key-file", str(keys), "--max-queue", str(known.clients), *options]
        with Server("octad", command, port, Path(tempfile.gettempdir()) / "octad-soak.log") as server:
            tell(f"ready after {server.wait():.1f} s")
            results = soaked(server, known.clients, known.minutes * 60, questions(known.questions))
    results |= {"command": command_line(), "hardware": hardware()}
    save(known.out, results)
    print(json.dumps(results))
    sys.exit(bool(results["wrong"]))


def soaked(server: Server, clients: int, seconds: float, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of it."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/models", headers={"Authorization": f"Bearer {KEY}"}
    )
    context = json.load(urllib.request.urlopen(request))["data"][0]["max_model_len"]
    expected = asyncio.run(alone(server.port, asked))
    tell(f"{len(asked)} questions answered alone; {clients} clients for {seconds:g} s")
    soak = Soak(server.port, asked, expected, context)
    asyncio.run(soak.run(server, clients, seconds))
    left = left_behind(server.port)
    early, late = grown(soak.memory)
    slowest = max(soak.health)
    if any(left.values()):
        soak.wrong.append(f"left behind: {left}")
    if late > early * GROWTH + 10:
        soak.wrong.append(f"memory: {early:.0f} MB, later {late:.0f} MB")
    if slowest > SLOWEST_HEALTH:
        soak.wrong.append(f"/health took {slowest:.2f} s")
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": dict(soak.deeds),
        "wrong": soak.wrong[:50],
        "left_behind": left,
        "memory_mb": {"second quarter": round(early, 1), "last quarter": round(late, 1)},
        "health_seconds": {
            "asked": len(soak.health),
            "median": round(statistics.median(soak.health), 4),
            "slowest": round(slowest, 4),
        },
    }


if __name__ == "__main__":
    main()
