"""A system without POSIX's own calls: everything is imported there, and a mixture is made, judged and asked."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from own_text import world

import octad
from octad import portable

# What Windows has not, taken away once the libraries of others are loaded; modules by a finder that refuses them
STUB = """
import ctypes, fcntl, importlib, os, pkgutil, shutil, signal, sys
import torch, numpy, pydantic, rich.progress, typer, safetensors.torch, tokenizers, huggingface_hub, yaml, jinja2, regex
import torch.distributed.checkpoint, torch.utils.checkpoint, torch._dynamo, transformers, fastapi, uvicorn, prompt_toolkit
import multiprocessing.shared_memory, asyncio, prometheus_client, datasets, lm_eval, markdown_it, llguidance
GONE = {"fcntl", "termios", "resource", "pwd", "grp", "tty", "pty"}
CALLS = ("pread", "preadv", "pwrite", "pwritev", "fchmod", "sysconf", "killpg", "getuid", "geteuid", "getgid", "fork",
         "setsid", "sched_getaffinity", "setpgid", "copy_file_range", "posix_fadvise", "getpgid", "mkfifo", "O_NOFOLLOW",
         "O_DIRECTORY", "O_CLOEXEC", "O_DIRECT", "posix_fallocate", "getloadavg", "sched_getscheduler", "set_blocking")

# No directory is opened there, no name changed or removed of what is open, no directory replaced, nothing synced that
# cannot be written; the C library has no name
opened, synced, renamed, replaced, unlinked = os.open, os.fsync, os.rename, os.replace, os.unlink
flags_of, access, only_read, links = fcntl.fcntl, os.O_ACCMODE, os.O_RDONLY, os.readlink

def open_(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *rest, **more)

def fsync(file):
    number = file if isinstance(file, int) else file.fileno()
    if flags_of(number, 3) & access == only_read:
        raise OSError(9, "Bad file descriptor")
    synced(file)

def refuse_held(path):
    place, held = os.path.realpath(path), []
    for number in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{number}"):
            held.append(links(f"/proc/self/fd/{number}"))
    with open("/proc/self/maps") as maps:
        held += [line.split(maxsplit=5)[-1].strip() for line in maps]
    if found := [h for h in held if h == place or h.startswith(place + "/")]:
        raise PermissionError(13, f"is used by a process: {found[0]}", str(path))

def rename(source, target):
    refuse_held(source)
    if os.path.lexists(target):
        raise FileExistsError(17, "File exists", str(target))
    renamed(source, target)

def replace(source, target):
    refuse_held(source)
    refuse_held(target)
    if os.path.isdir(target):
        raise PermissionError(13, "Permission denied", str(target))
    replaced(source, target)

def unlink(path, *rest, **more):
    refuse_held(path)
    unlinked(path, *rest, **more)

class CDLL(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *rest, **more)

ctypes.CDLL = CDLL

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
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGXCPU"):
    if hasattr(signal, name):
        delattr(signal, name)
sys.platform = "win32"
os.open, os.fsync, os.rename, os.replace, os.unlink, os.remove = open_, fsync, rename, replace, unlink, unlink
shutil._use_fd_functions = False
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
octad.edit_expert("remove", mixture, "two", output="fewer", progress=False)
octad.edit_expert("remove", mixture, "two", progress=False)
octad.quantize("tuned", "int8", progress=False)
octad.export("tuned", "one-alone", member="one", progress=False)
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


# ---- no call of POSIX without another way ----------------------------------------------------------------------------

MODULES = {"fcntl", "termios", "resource", "pwd", "grp", "tty", "pty", "syslog", "curses", "readline"}
OF_OS = re.findall(
    r"\w+",
    "pread preadv pwrite pwritev readv writev fchmod fchown chown lchown sysconf confstr killpg getpgid getpgrp setpgid"
    " getuid geteuid getgid getegid getgroups setuid setgid fork forkpty wait4 waitid setsid getsid sched_getaffinity"
    " sched_setaffinity sched_getscheduler sched_yield copy_file_range sendfile splice posix_fadvise posix_fallocate"
    " posix_spawn mkfifo mknod nice getpriority getloadavg statvfs fstatvfs fdatasync lockf openpty memfd_create"
    " pidfd_open uname chroot fchdir register_at_fork set_blocking eventfd O_NOFOLLOW O_DIRECTORY O_CLOEXEC O_DIRECT"
    " O_NONBLOCK O_SYNC O_TMPFILE SCHED_RR SCHED_FIFO WNOHANG",
)
OF_SIGNAL = re.findall(
    r"\w+",
    "SIGKILL SIGHUP SIGUSR1 SIGUSR2 SIGALRM SIGPIPE SIGCHLD SIGXCPU SIGSTOP SIGCONT SIGQUIT SIGWINCH alarm pause"
    " setitimer pthread_sigmask sigwait set_wakeup_fd siginterrupt",
)
# files whose callers ask first, each with the words by which they do
REFUSED = {
    "sandbox/confine.py": ("sandbox/run.py", 'os.name != "posix"'),  # what Sandbox() starts
    "sandbox/run.py": ("sandbox/run.py", 'os.name != "posix"'),  # Sandbox() itself
    "serve/child.py": ("serve/child.py", 'os.name != "posix"'),  # vllm_command(), before a Child is made
}
ASKED = ("hasattr(", "sys.platform", "os.name", "portable.DIRECTORIES", "except ImportError")


def posix_uses(tree: ast.Module) -> list[tuple[ast.AST, str]]:
    """Every place that needs what only POSIX systems have, by name."""
    found: list[tuple[ast.AST, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, a.name) for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append((node, node.module or ""))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {"os": OF_OS, "signal": OF_SIGNAL}.get(node.value.id, [])
            found += [(node, f"{node.value.id}.{node.attr}")] if node.attr in names else []
            found += [(node, "symlink")] if node.attr in ("symlink", "symlink_to", "link") else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [(node, node.value)] if node.value.startswith(("/proc/", "/dev/", "/sys/")) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CDLL"):
            found += (
                [(node, "the C library")] if ast.unparse(node.args[:1] or node).startswith("None") else []
            )
        elif isinstance(node, ast.keyword) and node.arg in ("preexec_fn", "pass_fds", "start_new_session"):
            found.append((node.value, node.arg))
    return found


def has_another_way(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether it is in a branch that asks for it, in a `try` that expects it to be missing, or behind an early return."""
    while node in parents:
        inner, node = node, parents[node]
        if isinstance(node, (ast.If, ast.IfExp)) and any(w in ast.unparse(node.test) for w in ASKED):
            return True
        if isinstance(node, ast.Try) and inner in node.body:
            caught = {
                n
                for h in node.handlers
                for n in ast.unparse(h.type or ast.Name("all")).strip("()").split(", ")
            }
            if caught & {"ImportError", "AttributeError", "OSError"}:
                return True
        if isinstance(node, ast.With) and "suppress(" in ast.unparse(node.items[0]):
            return True
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            before = node.body[: node.body.index(inner)] if inner in node.body else []
            if any(
                isinstance(s, ast.If)
                and isinstance(s.body[-1], (ast.Return, ast.Raise))
                and any(w in ast.unparse(s.test) for w in ASKED)
                for s in before
            ):
                return True
            if any(
                isinstance(s, ast.Try)
                and "ImportError" in ast.unparse(s)
                and any(isinstance(h.body[-1], ast.Return) for h in s.handlers)
                for s in before
            ):
                return True
    return False


def unguarded(source: str) -> list[str]:
    """What a file needs of POSIX with no other way, with its line."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return [
        f"line {getattr(n, 'lineno', 0)}: {what}"
        for n, what in posix_uses(tree)
        if not has_another_way(n, parents)
    ]


def test_no_call_of_posix_is_without_another_way() -> None:
    package = Path(octad.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name in REFUSED:
            asker, words = REFUSED[name]
            assert words in (package / asker).read_text(encoding="utf-8")
            continue
        found = unguarded(path.read_text(encoding="utf-8"))
        assert not found, (
            f"{name}: {found}; put it into octad/portable.py, or ask before (hasattr, sys.platform)"
        )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fcntl", ["line 1: fcntl"]),
        ("import os\nos.killpg(1, 9)", ["line 2: os.killpg"]),
        ("import os, signal\nos.kill(1, signal.SIGKILL)", ["line 2: signal.SIGKILL"]),
        ("open('/proc/self/maps')", ["line 1: /proc/self/maps"]),
        ("import ctypes\nctypes.CDLL(None).free(0)", ["line 2: the C library"]),
        ("p.symlink_to(q)", ["line 1: symlink"]),
        ("import os\nif hasattr(os, 'fork'):\n    os.fork()", []),
        (
            "def f():\n    try:\n        import fcntl\n    except ImportError:\n        return\n    fcntl.flock(1, 2)",
            [],
        ),
        ("import os\ndef f():\n    if os.name != 'posix':\n        return 0\n    return os.getuid()", []),
        (
            "import os\ndef f():\n    return os.getuid()\nif os.name == 'posix':\n    f()",
            ["line 3: os.getuid"],
        ),
    ],
)
def test_the_search_finds_what_it_should(source: str, found: list[str]) -> None:
    assert unguarded(source) == found


def test_files_are_opened_as_bytes() -> None:
    """Without O_BINARY, which portable.BINARY is there, Windows changes line ends and stops at a Ctrl-Z."""
    package, others = (
        Path(octad.__file__).parent,
        ("os.devnull", "history", "scratch", "O_DIRECTORY", "O_DIRECT"),
    )
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "sandbox":  # of POSIX systems alone
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "os.open":
                call = ast.unparse(node)
                assert (
                    "BINARY" in call
                    or any(word in call for word in others)
                    or "O_CREAT | os.O_RDWR, 384" in call
                ), f"{path}: {call}"
