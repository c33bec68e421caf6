"""The files in deploy/: their commands are ones that `octad serve` understands; systemd itself reads the unit."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from octad.cli.main import app

DEPLOY = Path(__file__).parents[2] / "deploy"
COMMAND = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
OPTIONS = {name for parameter in COMMAND.params for name in (*parameter.opts, *parameter.secondary_opts)}


def check(arguments: list[str]) -> None:
    """A model and options that exist."""
    assert not arguments[0].startswith("-")
    assert {word for word in arguments if word.startswith("--")} <= OPTIONS
    with COMMAND.make_context("serve", list(arguments)) as context:
        assert context.params["model"] == arguments[0]


def test_the_image() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    instructions = [line.split(" ", 1)[0] for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert instructions[0] == "FROM"
    assert "USER" in instructions[: instructions.index("ENTRYPOINT")]
    entry, command = (
        json.loads(line[1]) for line in re.finditer(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.M)
    )
    assert entry == ["octad", "serve"]
    check(command)


def test_the_compose_file() -> None:
    told = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = told["services"]["octad"]
    check(service["command"])
    assert (DEPLOY.parent / service["build"]["dockerfile"]).is_file()
    assert service["ports"][0].startswith("127.0.0.1:")
    assert set(service["secrets"]) == set(told["secrets"])


def test_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "octad.service").read_text()
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])  # type: ignore[index]
    assert command[1] == "serve"
    check(command[2:])
    if (program := shutil.which("systemd-analyze")) is None:
        pytest.skip("there is no systemd-analyze")
    unit = tmp_path / "octad.service"
    unit.write_text(text.replace(command[0], "/bin/true"))
    done = subprocess.run([program, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_site() -> None:
    """Streams are not held back, and the body's limit is the server's."""
    text = (DEPLOY / "nginx.conf").read_text()
    assert text.count("{") == text.count("}")
    for line in ("proxy_buffering off;", "client_max_body_size 8m;", "proxy_set_header Host $host;"):
        assert line in text
