"""The sandbox against programs that try to get out of it, or to pass without passing."""

import fcntl
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octad.errors import SandboxError
from octad.evaluate.tasks.catalogue import find_task
from octad.sandbox import confine
from octad.sandbox.run import Limits, Sandbox

FAST = Limits(cpu_seconds=1, wall_seconds=20)


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(FAST)
    except SandboxError as error:
        pytest.skip(f"only the weak wall can be tested here: {error}")


@pytest.fixture(scope="module")
def weak() -> Sandbox:
    return Sandbox(FAST, weak=True, kernel=False)


def reason(sandbox: Sandbox, program: str) -> str:
    outcome = sandbox.run(program)
    assert not outcome.passed
    return outcome.reason


def test_plain_programs_run(sandbox: Sandbox) -> None:
    assert sandbox.walls.strong
    modules = (
        "math, re, json, random, hashlib, collections, itertools, typing, datetime, decimal, heapq, string"
    )
    assert sandbox.run(f"import {modules}\nassert math.sqrt(16) == 4").passed
    assert sandbox.run("if __name__ == '__main__':\n    done = True\nassert done").passed
    assert sandbox.run("from __future__ import annotations\nx: nowhere = 1").passed
    thread = "import threading\nt = threading.Thread(target=list)\nt.start()\nt.join()"
    assert sandbox.run(thread).passed


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("class E(Exception):\n    __str__ = None\nraise E", "an error that cannot be shown"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "left early with exit code 0"),
        ("import os; os._exit(7)", "left early with exit code 7"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
def test_only_reaching_the_end_is_a_pass(sandbox: Sandbox, program: str, why: str) -> None:
    assert reason(sandbox, program).startswith(why)


def test_an_outcome_that_the_program_made_up_is_none(sandbox: Sandbox) -> None:
    forged = """
import os
for fd in range(3, 32):
    try:
        os.write(fd, b'{"token": "0", "outcome": "passed", "reason": "", "held": {}}')
    except OSError:
        pass
os._exit(0)
"""
    assert reason(sandbox, forged) == "left early with exit code 0"
    assert not sandbox.run("import sys; print('passed'); sys.stdout.flush(); import os; os._exit(0)").passed


def test_time(sandbox: Sandbox) -> None:
    assert reason(sandbox, "while True: pass") == "time"
    hurried = Sandbox(Limits(wall_seconds=1.5))
    assert reason(hurried, "import time\ntime.sleep(60)") == "time"


def test_memory(sandbox: Sandbox) -> None:
    assert reason(sandbox, "x = bytearray(1 << 31)") == "MemoryError"
    assert "thread" in reason(
        sandbox,
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    )


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.kill(-1, 0)",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "import os\nos.chroot('.')",
    ],
)
def test_no_other_process_is_begun_or_touched(sandbox: Sandbox, program: str) -> None:
    assert reason(sandbox, program).startswith("PermissionError")


def test_system_calls_cannot_be_made_around_python(sandbox: Sandbox) -> None:
    """What ctypes reaches goes through the same kernel: unshare, ptrace, mount, io_uring_setup, memfd_create."""
    numbers = {"x86_64": (272, 101, 165, 425, 319), "aarch64": (97, 117, 40, 425, 279)}[os.uname().machine]
    program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n" + "".join(
        f"assert libc.syscall({n}, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1, {n}\n" for n in numbers
    )
    assert sandbox.run(program).passed
    assert reason(sandbox, "import ctypes\nassert ctypes.CDLL(None).fork() >= 0").startswith("AssertionError")


def test_no_network(sandbox: Sandbox) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)"
        assert reason(sandbox, call).startswith(("PermissionError", "OSError"))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert reason(sandbox, "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)").startswith(
        "PermissionError"
    )


def test_files_outside_scratch_are_neither_written_nor_read(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    os.chmod(tmp_path, 0o777)
    for attempt in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(secret)!r}, 'a')",
        f"open({str(secret)!r}).read()",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.chmod({str(secret)!r}, 0)",
        f"import os; os.utime({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'here')",
        f"import os; os.link({str(secret)!r}, 'here')",
        f"import os; os.symlink({str(secret)!r}, 'here'); open('here').read()",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "import os; os.listdir('/')",
        "import os; os.mkdir('/dev/shm/here')",
    ):
        assert reason(sandbox, attempt).startswith(("PermissionError", "OSError: [Errno 18]")), attempt
    assert [p.name for p in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == "s"


def test_scratch_is_small_and_gone_afterwards(sandbox: Sandbox) -> None:
    assert sandbox.run(
        "import os\nopen('a', 'w').write('x')\nos.mkdir('d')\nos.rename('a', 'd/a')\nassert open('d/a').read() == 'x'"
    ).passed
    assert reason(sandbox, "open('a', 'wb').write(bytes(1 << 22))").startswith("OSError: [Errno 27]")
    where = reason(sandbox, "import os\nraise ValueError(os.getcwd())").removeprefix("ValueError: ")
    assert Path(where).is_absolute()
    assert not Path(where).exists()


def test_nothing_of_the_parent_is_inherited(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAD_TEST_SECRET", "s")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    try:
        names = reason(sandbox, "import os\nraise ValueError(*sorted(os.environ))")
        assert (
            names == "ValueError: ('HOME', 'LANG', 'PYTHONHASHSEED', 'TMPDIR')"
            or "LC_CTYPE" in names  # which Python may set itself
        )
        program = """
import os
found = []
for fd in range(4096):
    try:
        os.fstat(fd)
        found.append(fd)
    except OSError:
        pass
assert len(found) == 4, found   # three that go nowhere, one for the outcome
"""
        assert sandbox.run(program).passed
        assert sandbox.run(
            "import sys\nassert not any('site-packages' in p for p in sys.path), sys.path"
        ).passed
    finally:
        os.close(reading)
        os.close(writing)


def test_order_and_progress_of_many(sandbox: Sandbox) -> None:
    told: list[int] = []
    outcomes = sandbox.run_all([f"assert {n} % 3" for n in range(6)], told.append)
    assert [o.passed for o in outcomes] == [bool(n % 3) for n in range(6)]
    assert told == [1, 2, 3, 4, 5, 6]


def test_without_the_kernels_help_it_refuses_and_says_so() -> None:
    with pytest.raises(SandboxError, match=r"cannot confine programs .*--weak-sandbox"):
        Sandbox(FAST, kernel=False)


@pytest.mark.parametrize(
    "program",
    [
        "open('/tmp/octad-test-evil', 'w')",
        "import os; os.remove('/tmp/octad-test-evil')",
        "import os; os.open('/tmp/octad-test-evil', os.O_CREAT | os.O_WRONLY)",
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import os; os.system('true')",
        "import os; os.kill(os.getppid(), 9)",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_the_weak_wall_refuses_the_plain_ways(weak: Sandbox, program: str) -> None:
    assert not weak.walls.strong
    assert "the sandbox refuses" in reason(weak, program)


def test_the_weak_wall_lets_honest_programs_through(weak: Sandbox) -> None:
    honest = "import math, os\nopen('a', 'w').write('x')\nos.rename('a', 'b')\nassert open('b').read() == 'x'"
    assert weak.run(honest).passed
    assert reason(weak, "import os; os._exit(0)") == "left early with exit code 0"
    assert reason(weak, "x = bytearray(1 << 31)") == "MemoryError" or sys.platform == "darwin"


def test_where_namespaces_are_forbidden_the_other_walls_hold(sandbox: Sandbox) -> None:
    """As in many containers: unshare fails, so the scratch directory is the disk's and the network is seccomp's alone."""
    unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    program = f"""
import ctypes
from octad.sandbox import confine
from octad.sandbox.run import Sandbox
libc = ctypes.CDLL(None)
libc.prctl(confine.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
deny = [(confine.LOAD, 0, 0, 0), (confine.EQUAL, 0, 1, {unshare})]
deny += [(confine.RETURN, 0, 0, confine.ERRNO | 1), (confine.RETURN, 0, 0, confine.ALLOW)]
assert confine.install(libc, deny)
sandbox = Sandbox()
print(sandbox.walls.network)
for attempt in ("import socket; socket.socket()", "open('/tmp/octad-test-evil', 'w')", "import os; os.fork()"):
    assert sandbox.run(attempt).reason.startswith("PermissionError"), attempt
assert sandbox.run("open('a', 'w').write('x')").passed
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "seccomp\n", "")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_system_call_numbers_are_the_kernels_own(machine: str) -> None:
    """Against the headers of this machine, where they are installed."""
    files = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    file = Path(files[machine])
    if not file.is_file():
        pytest.skip("no kernel headers here")
    text = file.read_text().replace("__NR3264_fstatat", "__NR_newfstatat").replace("__NR3264_", "__NR_")
    known = {n: int(at) for n, at in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    allowed = confine.numbers(confine.CALLS, machine)
    formed = confine.numbers(confine.FORMS, machine)
    assert allowed | formed == {name: known[name] for name in [*allowed, *formed]}
    assert confine.MACHINES[machine][2] == known["clone"]
    never = "socket execve execveat kill tkill tgkill ptrace prlimit64 io_uring_setup memfd_create unshare setns mount"
    never += " bpf clone3 fchmod fchmodat setxattr utimensat inotify_init1 fanotify_init keyctl userfaultfd"
    assert not {known[name] for name in never.split()} & {*allowed.values(), *formed.values()}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers are those of x86-64")
def test_every_call_that_is_not_allowed_is_denied_also_those_of_newer_kernels(sandbox: Sandbox) -> None:
    allowed = set(confine.numbers(confine.CALLS, "x86_64").values())
    allowed |= set(confine.numbers(confine.FORMS, "x86_64").values())
    allowed |= {56, confine.CLONE3}  # threads; and what makes libc fall back to the former
    allowed |= {335, 336}  # uretprobe, uprobe: the kernel filters neither, and kills who calls them by hand
    denied = [n for n in [*range(600), 1000, 4096, 0x40000000, 0x40000001] if n not in allowed]
    assert {463, 253, 294, 300, 425, 101, 250, 248, 323, 298, 321, 467} <= set(
        denied
    )  # setxattrat, inotify, ...
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
for n in {denied}:
    ctypes.set_errno(0)
    assert (libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) == (-1, 1), n
"""
    assert sandbox.run(program).reason == ""


@pytest.mark.parametrize(
    "attempt",
    [
        "fcntl.fcntl(os.open('.', 0), 1026, 1)",  # F_NOTIFY: a watch on a directory
        "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",  # signals to another process
        "fcntl.ioctl(os.open('a', os.O_CREAT), 0x40086602, bytes(8))",  # FS_IOC_SETFLAGS
        "fcntl.flock(0, fcntl.LOCK_EX)",
        "libc.prctl(1, 0, 0, 0, 0) and os.strerror(ctypes.get_errno()) and os.kill(0, 0)",  # outlive octad
        "os.setxattr('.', 'user.x', b'1')",
        "os.eventfd(0) and os.memfd_create('x')",
        "os.sched_setaffinity(0, {0})",
        "os.setsid()",
        "os.mkfifo('f')",
    ],
)
def test_forms_and_calls_that_programs_try_are_refused(sandbox: Sandbox, attempt: str) -> None:
    program = f"import ctypes, fcntl, os\nlibc = ctypes.CDLL(None, use_errno=True)\n{attempt}"
    assert reason(sandbox, program).startswith("PermissionError"), attempt


def test_programs_like_those_of_benchmarks_run(sandbox: Sandbox) -> None:
    """What their authors import and do, and the shipped problems with their own solutions."""
    modules = (
        "abc array asyncio base64 bisect calendar cmath collections contextlib copy csv dataclasses datetime decimal"
        " difflib enum fractions functools gc glob hashlib heapq html io itertools json locale logging math numbers"
        " operator os pathlib pickle pprint queue random re secrets shutil signal sqlite3 statistics string struct sys"
        " tempfile textwrap threading time timeit traceback types typing unicodedata unittest uuid weakref zlib"
    )
    assert sandbox.run(f"import {', '.join(modules.split())}").reason == ""
    assert sandbox.run(MIXED).reason == ""
    problems = find_task("octad-code").examples
    programs = [f"{p.prompt}{p.canonical_solution}\n{p.test}\ncheck({p.entry_point})\n" for p in problems]
    assert [o.reason for o in sandbox.run_all(programs)] == [""] * len(programs)


MIXED = """
import collections, datetime, decimal, itertools, json, os, random, re, signal, sqlite3, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
assert re.findall(r"(\\d+)-(?=x)", "12-x 3-y 45-x") == ["12", "45"]
assert len(list(itertools.permutations("abcd"))) == 24
assert json.loads(json.dumps({"a": [1.5, None, "é"]})) == {"a": [1.5, None, "é"]}
assert collections.Counter("banana").most_common(1) == [("a", 3)]
assert str(decimal.Decimal(1) / 7)[:6] == "0.1428"
random.seed(7); assert random.Random(7).random() == random.random()
assert (datetime.date(2024, 3, 1) - datetime.date(2024, 2, 1)).days == 29
assert datetime.datetime.now().year >= 2024 and time.time() > 0 and time.perf_counter() > 0
with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(lambda x: x * x, range(10)))[3] == 9
event = threading.Event(); threading.Timer(0.01, event.set).start(); assert event.wait(5)
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("text"); file.seek(0); assert file.read() == "text"
with tempfile.TemporaryDirectory() as place:
    file = os.path.join(place, "a.txt"); open(file, "w").write("1\\n2\\n"); assert sum(map(int, open(file))) == 3
database = sqlite3.connect("file.db"); database.execute("create table t (x)")
database.execute("insert into t values (3)"); database.commit()
assert database.execute("select x from t").fetchone() == (3,)
rang = []
signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number)); signal.setitimer(signal.ITIMER_REAL, 0.01)
while not rang: time.sleep(0.01)
assert os.urandom(4) and os.cpu_count() and os.getpid() and os.path.exists(".")
"""


@pytest.mark.parametrize(
    "sent",
    [
        "{'token': token}",
        "{'token': token, 'outcome': 'passed'}",
        "{'token': token, 'outcome': [], 'reason': {}, 'held': 3}",
        "{'token': token, 'outcome': 'passed', 'reason': '', 'held': {'walls': 1}}",
        "{'token': 'é' * 16}",
        "{'token': '\\ud800'}",
        "[token]",
        "7",
    ],
)
def test_whatever_comes_over_the_result_channel_is_an_outcome(sandbox: Sandbox, sent: str) -> None:
    """From a program that found the token in its own process."""
    program = f"""
import json, os, sys
token = sys._getframe().f_back.f_locals["job"]["token"]
for fd in range(3, 32):
    try:
        os.write(fd, json.dumps({sent}).encode())
    except OSError:
        pass
os._exit(0)
"""
    outcome = sandbox.run(program)
    assert (outcome.passed, outcome.reason) == (False, "left early with exit code 0")


def test_programs_die_with_octad_and_the_next_run_removes_what_they_left(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import os\nfrom octad.sandbox.run import Limits, Sandbox\n"
    program += "Sandbox(Limits(cpu_seconds=60)).run('import time\\nwhile True: time.sleep(1)')"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    octad = subprocess.Popen([sys.executable, "-c", program], env=environment)
    (child,) = wait_for(lambda: [c for c in children(octad.pid) if list(tmp_path.iterdir()) and sleeps(c)])
    octad.kill()
    octad.wait()
    wait_for(lambda: not Path(f"/proc/{child}").exists() or state(child) in "ZX")
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Sandbox(FAST).run("pass").passed
    assert left.exists()  # too young to know whose it is
    os.utime(left, (0, 0))
    busy = tmp_path / "octad-sandbox-busy"
    busy.mkdir()
    os.utime(busy, (0, 0))
    held = os.open(busy, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    assert Sandbox(FAST).walls.strong
    assert list(tmp_path.iterdir()) == [busy]
    os.close(held)


def children(parent: int) -> list[int]:
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [pid for pid in pids if ppid(pid) == parent]


def ppid(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def sleeps(pid: int) -> bool:
    """Whether the far side has come as far as the program: its filter of system calls is in place."""
    try:
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition: Callable[[], Any]) -> Any:
    for _ in range(1500):
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it never came")
