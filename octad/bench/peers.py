"""The contestants of a benchmark as it sees them: octad's engine and transformers in a worker process each, and
llama.cpp through its own llama-bench.

    with Worker("octad int8", {"system": "octad", ...}, threads=2) as contestant:
        contestant.decode(prompts, steps=64)["seconds"]

A contestant that is missing or fails raises Unmeasured with one line that says why; the benchmark reports the line and
goes on with the others. Between calls a worker sleeps on its stdin, so the contestants can take turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

from octad.machine import memory_of

Prompts = Sequence[Sequence[int]]


class Unmeasured(Exception):
    """Something could not be measured; the message is the reason."""


class Contestant(Protocol):
    """One system in one configuration. `facts` is what it tells about itself once started."""

    name: str
    system: str
    facts: dict[str, Any]

    def start(self) -> None:
        """Load. Raises Unmeasured."""

    def warm_up(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """One run that is not counted; what only a run that is not timed can tell."""

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """`seconds` and `ttft` (None where not measured) of reading a prompt. Raises Unmeasured."""

    def decode(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """`seconds`, `tokens`, `ttft` of each answer, `lengths` half-way. Raises Unmeasured."""

    def memory(self) -> dict[str, int]:
        """Resident bytes: `resident` now, `peak` so far."""

    def close(self) -> None:
        """End its process."""


class Worker:
    """A contestant behind octad.bench.worker."""

    def __init__(self, name: str, settings: Mapping[str, Any], threads: int) -> None:
        self.name, self.system = name, str(settings["system"])
        self.settings, self.threads = dict(settings), threads
        self.facts: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self.last: dict[str, int] = {}
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)

    def start(self) -> None:
        """See Contestant.start."""
        command = [sys.executable, "-m", "octad.bench.worker", json.dumps(self.settings)]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.facts = self._answer("facts")

    def warm_up(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """See Contestant.warm_up: `distinct_experts` a step and layer, where the model has experts."""
        return self._call("decode", prompts=prompts, steps=steps, warm=True)

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """See Contestant.prefill."""
        return self._call("prefill", prompt=prompt)

    def decode(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """See Contestant.decode."""
        return self._call("decode", prompts=prompts, steps=steps, warm=False)

    def memory(self) -> dict[str, int]:
        """See Contestant.memory; the last known where the process has ended."""
        if self.process is not None:
            self.last = memory_of(self.process.pid) or self.last
        return self.last

    def close(self) -> None:
        """See Contestant.close."""
        if self.process is None:
            return
        self.memory()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        self.log.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, call: str, **arguments: Any) -> dict[str, Any]:
        if self.process is None or self.process.stdin is None:
            raise Unmeasured("its process has ended")
        try:
            self.process.stdin.write(json.dumps({"call": call} | arguments) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Unmeasured(self._ended()) from None
        return self._answer("found")

    def _answer(self, key: str) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Unmeasured(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise Unmeasured(answer["error"])
        return dict(answer[key])

    def _ended(self) -> str:
        """Why the process is gone: its exit status and the last line that it printed."""
        assert self.process is not None
        status = self.process.wait()
        return f"its process ended with status {status}{last_line(self.log)}"


class LlamaBench:
    """llama.cpp on one GGUF file. Each measurement is a run of llama-bench, which warms up by itself; its prompts are
    random ids of its own, and it decodes one sequence."""

    system = "llama.cpp"

    def __init__(self, program: str, file: Path, threads: int, gpu: bool = False) -> None:
        self.program, self.file, self.threads, self.gpu = program, file, threads, gpu
        self.name = f"llama.cpp {file.stem}"
        self.facts: dict[str, Any] = {}
        self.peak = 0

    def start(self) -> None:
        """One short run: that it works at all, and what it says of itself and the file."""
        if not self.file.is_file():
            raise Unmeasured(f"{self.file}: no such file")
        entry = self._run(16, 0, 0)
        kind = str(entry["model_type"])
        self.name = f"llama.cpp {kind.split(' ', 2)[-1] if kind.count(' ') > 1 else kind}"
        self.facts = {
            "model_type": kind,
            "file": self.file.name,
            "version": f"{entry['build_commit']} ({entry['build_number']})",
            "threads": entry["n_threads"],
            "weight_bytes": entry["model_size"],
            "parameters": entry["model_n_params"],
        }

    def warm_up(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """Nothing to do: llama-bench warms up by itself each time."""
        return {}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        """llama-bench's pp test."""
        return {"seconds": len(prompt) / self._run(len(prompt), 0, 0)["avg_ts"], "ttft": None}

    def decode(self, prompts: Prompts, steps: int) -> dict[str, Any]:
        """llama-bench's tg test behind a context as long as the prompt."""
        if len(prompts) > 1:
            raise Unmeasured("llama-bench decodes one sequence")
        entry = self._run(0, steps, len(prompts[0]))
        lengths = [len(prompts[0]) + steps / 2]
        return {"seconds": steps / entry["avg_ts"], "tokens": steps, "ttft": [], "lengths": lengths}

    def memory(self) -> dict[str, int]:
        """The highest resident size of any of its runs (weights are mapped from the file, and count)."""
        return {"peak": self.peak} if self.peak else {}

    def close(self) -> None:
        """Nothing stays."""

    def _run(self, prompt: int, generate: int, depth: int) -> dict[str, Any]:
        counts = {"-p": prompt, "-n": generate, "-d": depth, "-t": self.threads, "-r": 1}
        options = [str(part) for pair in counts.items() for part in pair]
        device = [] if self.gpu else ["-ngl", "0"]
        command = [self.program, "-m", str(self.file), "-o", "json", *options, *device]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
            try:
                process = subprocess.Popen(command, stdout=out, stderr=log)
            except OSError as error:
                raise Unmeasured(f"{self.program}: {error.strerror or error}") from None
            while process.poll() is None:
                self.peak = max(self.peak, memory_of(process.pid).get("peak", 0))
                time.sleep(0.1)
            if process.returncode:
                raise Unmeasured(f"llama-bench ended with status {process.returncode}{last_line(log)}")
            out.seek(0)
            return parse_llama_bench(out.read())


def parse_llama_bench(text: bytes) -> dict[str, Any]:
    """The last test in llama-bench's JSON. Raises Unmeasured where it is no such thing."""
    try:
        entry = dict(json.loads(text)[-1])
        if not float(entry["avg_ts"]) > 0:
            raise ValueError("no speed in it")
    except (ValueError, LookupError, TypeError) as error:
        raise Unmeasured(f"llama-bench's output was not understood ({error})") from None
    return entry


def find_llama_bench(given: str | None) -> str:
    """The program: the path given, or what the shell would find. Raises Unmeasured."""
    program = shutil.which(given or "llama-bench")
    if program is None:
        what = f"{given}: no such program" if given else "llama-bench is not on the PATH"
        raise Unmeasured(f"{what}; build llama.cpp and give --llama-bench PATH")
    return program


def last_line(log: IO[bytes]) -> str:
    """ ": the last line of a log that is not empty", or nothing."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:200]}" if lines else ""
