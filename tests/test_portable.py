"""A system without POSIX's own calls: everything is imported there, and a mixture is made, judged and asked."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from own_text import world

import octad
from octad import portable

# What Windows has not, taken away once the libraries of others are loaded; modules by a finder that refuses them
STUB = """
import importlib, os, pkgutil, signal, sys
import torch, numpy, pydantic, rich.progress, typer, safetensors.torch, tokenizers, huggingface_hub, yaml, jinja2, regex
import torch.distributed.checkpoint, torch.utils.checkpoint, torch._dynamo, transformers, fastapi, uvicorn, prompt_toolkit
import multiprocessing.shared_memory, asyncio, prometheus_client, datasets, lm_eval, markdown_it, llguidance
GONE = {"fcntl", "termios", "resource", "pwd", "grp", "tty", "pty"}
CALLS = ("pread", "preadv", "pwrite", "pwritev", "fchmod", "sysconf", "killpg", "getuid", "geteuid", "getgid", "fork",
         "setsid", "sched_getaffinity", "copy_file_range", "posix_fadvise", "getpgid", "mkfifo", "O_NOFOLLOW",
         "O_DIRECTORY", "O_CLOEXEC")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in GONE:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
for name in CALLS:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)
import octad
for found in pkgutil.walk_packages(octad.__path__, "octad."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
"""
WORK = """
torch.set_num_threads(1)
mixture = octad.combine("recipe.yaml", "mixture", progress=False)
octad.combine("recipe.yaml", "mixture", overwrite=True, progress=False)
verdict = octad.evaluate(mixture, {"one": "one.jsonl"}, tokens=64, window=32, progress=False)
assert len(verdict.report["contestants"]) > 6
octad.train("tune.yaml", "tuned", progress=False)
params = octad.SamplingParams(max_tokens=3, ignore_eos=True)
answer = octad.LLM("tuned", native=False).generate("Once", params)[0].outputs[0]
assert len(answer.token_ids) == 3
from octad.sandbox.run import Sandbox
print(Sandbox.__name__, "done")
"""


@pytest.mark.slow
def test_without_posix(tmp_path: Path) -> None:
    world(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STUB + WORK],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["Sandbox done"]), done.stderr[-2000:]


def test_both_ways_read_and_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"

    def all_of_it() -> tuple[bytes, bytes, bytes]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        portable.lock(fd)
        portable.write_at(fd, b"0123456789", 0)
        portable.write_at(fd, b"abc", 4)
        buffer = bytearray(4)
        count = portable.read_into(fd, memoryview(buffer), 3)
        read = portable.read_at(fd, 5, 6)
        os.close(fd)
        return bytes(buffer[:count]), read, path.read_bytes()

    with_calls = all_of_it()
    path.unlink()
    for name in ("pread", "preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    assert all_of_it() == with_calls == (b"3abc", b"c789", b"0123abc789")
    assert portable.memory_bytes() > 1e8
    assert portable.is_alive(os.getpid())
    monkeypatch.delattr(os, "sysconf")
    assert portable.memory_bytes() == 0  # not asked, and not Windows


def test_nothing_is_imported_that_newer_pythons_took_away() -> None:
    """What 3.12, 3.13 and 3.14 have no longer; that the syntax is theirs is the linter's business."""
    names = (
        "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib"
        " ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
    )
    removed = set(names.split(" "))
    package = Path(octad.__file__).parent
    imported = {m.split(".")[0] for path in package.rglob("*.py") for m in imported_modules(path)}
    assert imported & removed == set()
    assert "json" in imported  # so that it is known to look


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found
