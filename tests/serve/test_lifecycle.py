"""A server's life: open at once, ready when it can answer, draining when told to; and the command."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import CONTEXT, Running, Start, running, served_mixture, start
from typer.testing import CliRunner

from octad.cli.main import app as command_line
from octad.engine.llm import LLM
from octad.errors import CheckpointError
from octad.serve.app import Application
from octad.serve.lifecycle import ServerState, start_loading
from octad.serve.listing import ModelNames


def test_ready_once_a_token_could_be_made(served_mixture: Path) -> None:
    app, go = Application(ModelNames.now(["m"])), threading.Event()

    def load(tell: Any) -> LLM:
        tell("reading the weights", 0.25)
        go.wait(20)
        return LLM(served_mixture, dtype="float32", num_blocks=20)

    thread = start_loading(app.state, load, app.ready)
    while app.state.progress < 0.25:
        time.sleep(0.01)
    status, told = app.state.health()
    assert (status, told["status"], told["progress"], told["stage"]) == (
        503,
        "loading",
        0.25,
        "reading the weights",
    )
    assert told["error"]["code"] == "loading"
    go.set()
    thread.join(60)
    assert app.state.health() == (200, {"status": "ok"})
    assert app.generator.llm.engine.stats.generated_tokens == 1


def test_a_model_that_cannot_be_opened() -> None:
    state = ServerState()

    def load(tell: Any) -> LLM:
        raise CheckpointError("the weights are damaged")

    start_loading(state, load, lambda llm: None).join(20)
    status, told = state.health()
    assert (status, told["status"]) == (503, "failed")
    assert "the weights are damaged" in told["error"]["message"]


def test_draining(start: Start) -> None:
    """What runs is answered to the end, new requests are sent away, and then the server ends."""
    running = start()
    body = {
        "model": "mixture",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1500,
        "ignore_eos": True,
    }
    found: dict[str, Any] = {}
    asking = threading.Thread(target=lambda: found.update(running.post("/v1/chat/completions", body).json()))
    asking.start()
    while running.llm.engine.stats.running == 0:
        time.sleep(0.01)
    running.server.handle_exit(signal.SIGTERM, None)
    health = running.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    refused = running.post("/v1/chat/completions", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]
    asking.join(60)
    assert found["usage"]["completion_tokens"] == 1500
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            running.get("/health")
        except httpx2.TransportError:
            return
        time.sleep(0.05)
    pytest.fail("the server did not end")


def test_the_command(served_mixture: Path, tmp_path: Path) -> None:
    """From the command to an answer, and to its end by SIGTERM with exit code 0."""
    command = [
        sys.executable,
        "-m",
        "octad",
        "serve",
        str(served_mixture),
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            url = line.partition("http://")[2].partition("/ is")[0]
            assert url, line
            deadline = time.monotonic() + 60
            while httpx2.get(f"http://{url}/health").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            body = {"messages": [{"role": "user", "content": "secret words"}], "max_tokens": 3}
            answer = httpx2.post(f"http://{url}/v1/chat/completions", json=body)
            assert answer.json()["model"] == "mixture"
            process.send_signal(signal.SIGTERM)
            log = process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()
    lines = [json.loads(text) for text in log.splitlines() if text.startswith("{")]
    assert {"path": "/v1/chat/completions", "status": 200}.items() <= lines[-1].items()
    assert answer.headers["x-request-id"] == lines[-1]["request"]
    assert "octad: ready\n" in log
    assert "secret" not in log


def test_mistakes_on_the_command_line(tmp_path: Path, served_mixture: Path) -> None:
    for options, told in (
        (["no/such/model"], "no/such/model"),
        ([str(served_mixture), "--cors", "*"], "--cors"),
        (
            [str(served_mixture), "--api-key-file", str(tmp_path / "none")],
            "cannot be read (No such file or directory)",
        ),
        ([str(served_mixture), "--host", "203.0.113.9", "--port", "1"], "cannot be opened"),
        ([str(served_mixture), "--host", "203.0.113.9"], "choose another host: an address of this machine"),
        ([str(served_mixture), "--host", "999.1.1.1"], "choose another host"),
    ):
        found = CliRunner().invoke(command_line, ["serve", *options])
        assert found.exception is not None
        assert told in str(found.exception)
