"""Kill every command that writes, before each call that changes the file system and at random moments.

    make kill                           # all calls, and 5 random moments, of all commands
    make kill POINTS=20                 # at most 20 calls of each
    python tests/kill/kill.py --only combine

After each kill: what loads is the old output or the new one, whole; the same command then finishes (or says that it has);
what it made is the same, to the byte of weights and configuration, as without a kill; no hidden file is left. Ends with a
table, and with exit code 1 where anything is amiss. Each run is a fork of one process that has imported everything, with
one thread; SIGKILL comes from within, so that it is exact.
"""

import argparse
import gc
import hashlib
import importlib
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
)
CALLS = ("pwrite", "fsync", "posix_fallocate", "copy_file_range", "fchmod")


@dataclass
class Command:
    """What is run, what must have run before, and the directories or files that it makes or changes; with
    `kernels`, the native library has to be compiled first. What `edits` is another edit where it was done already."""

    arguments: list[str]
    outputs: list[str]
    before: list[list[str]] = field(default_factory=list)
    kernels: bool = False
    edits: bool = False


COMBINE = ["combine", "recipe.yaml", "-o", "mix"]
ADD = ["expert", "add", "mix", "--name", "newcomer", "--model", "full", "--data", "text-2.jsonl"]
COMMANDS = {
    "combine": Command(COMBINE, ["mix"]),
    "combine over": Command([*COMBINE, "--overwrite"], ["mix"], [COMBINE]),
    "expert add": Command(ADD, ["mix"], [COMBINE]),
    "expert replace": Command(
        ["expert", "replace", "mix", "--name", "lora", "--model", "full", "--data", "text-2.jsonl"],
        ["mix"],
        [COMBINE],
        edits=True,
    ),
    "expert remove": Command(["expert", "remove", "mix", "--name", "lora"], ["mix"], [COMBINE]),
    "quantize": Command(["quantize", "mix", "-o", "int8", "--to", "int8"], ["int8"], [COMBINE]),
    "quantize judged": Command(
        ["quantize", "mix", "-o", "int8", "--to", "int8", "--data", "domains.yaml", "--tokens", "64"],
        ["int8"],
        [COMBINE],
    ),
    "kernels": Command(["generate", "mix", "a", "--max-tokens", "2"], [], [COMBINE], kernels=True),
    "export gguf": Command(
        ["export", "mix", "--to", "gguf", "-o", "out/mix.gguf", "--quantize", "q8_0", "--overwrite"],
        ["out/mix.gguf"],
        [COMBINE],
    ),
    "export member": Command(
        ["export", "mix", "--member", "lora", "-o", "member", "--dtype", "bfloat16"], ["member"], [COMBINE]
    ),
    "branch": Command(["branch", "branch.yaml", "-o", "specialists"], ["specialists/one"]),
    "train": Command(["train", "train.yaml", "-o", "run"], ["run"], [COMBINE]),
    "evaluate": Command(
        [
            "evaluate",
            "mix",
            "--data",
            "domains.yaml",
            "--tokens",
            "64",
            "--window",
            "32",
            "--report",
            "report",
        ],
        ["mix"],
        [COMBINE],
    ),
    "demo": Command(["demo", "--output", "mix"], ["mix"]),
}


# ---- one run in a process of its own -----------------------------------------------------------------------------


def run(
    place: Path, arguments: list[str], die_at: int | None = None, after: float | None = None
) -> tuple[int, int, str]:
    """Exit code (-9: killed), the calls that changed the file system, and the last of what was printed."""
    told, tell = os.pipe()
    said = place.with_name("said")
    child = os.fork()
    if not child:
        _be_the_command(place, arguments, die_at, tell, said)
    os.close(tell)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    count = len(os.read(told, 1 << 20))
    os.close(told)
    return os.waitstatus_to_exitcode(status), count, said.read_text(errors="replace")[-2000:]


def _be_the_command(place: Path, arguments: list[str], die_at: int | None, tell: int, said: Path) -> None:
    """Never comes back."""
    code: Any = 1
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(place)
        (place / "tmp").mkdir(exist_ok=True)
        os.environ |= {"OCTAD_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp"), "COLUMNS": "200"}
        tempfile.tempdir = None
        _count_calls(str(place), die_at, tell)
        from octad.cli.main import main
        from octad.demo import demo

        demo.HERE, demo.SAMPLES, demo.TOKENS, demo.WINDOW = place, demo.SAMPLES[:1], 64, 32
        sys.argv = ["octad", *arguments]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _count_calls(place: str, die_at: int | None, tell: int) -> None:
    """One byte into the pipe before each call that changes what lies under `place`; SIGKILL instead of the chosen one."""
    count = [0]

    def one_more() -> None:
        count[0] += 1
        if count[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(tell, b".")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        mine = bool(arguments) and str(arguments[0]).startswith(place)
        if mine and (event in EVENTS or (event == "open" and int(arguments[2] or 0) & WRITES)):
            one_more()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*arguments: Any, **options: Any) -> Any:
            one_more()
            return call(*arguments, **options)

        return instead

    from octad import staging

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    staging._exchange = counted(staging._exchange)  # type: ignore[assignment]
    sys.addaudithook(hook)


# ---- what is there afterwards -----------------------------------------------------------------------------------


def digest(directory: Path) -> str:
    """Of what a file, a checkpoint or an adapter is: weights, configuration."""
    found = hashlib.sha256()
    if directory.is_file():
        return hashlib.sha256(directory.read_bytes()).hexdigest()
    names = (
        "*.safetensors",
        "config.json",
        "adapter_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    )
    for path in sorted(p for name in names for p in directory.glob(name)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def loads(directory: Path) -> bool:
    """Whether octad takes it for a model or an adapter."""
    from octad.checkpoint.load import open_source
    from octad.checkpoint.shard import read_header
    from octad.errors import OctadError
    from octad.guard import read_object

    try:
        if directory.is_file():
            open_source(directory)
        elif (directory / "adapter_config.json").exists():
            read_object(directory / "adapter_config.json")
            read_header(directory / "adapter_model.safetensors")
        else:
            open_source(directory, quantised=True)
    except OctadError:
        return False
    return True


def litter(place: Path) -> list[str]:
    """Hidden files and directories anywhere, and whatever lies in the temporary directory."""
    hidden = [str(p.relative_to(place)) for p in place.rglob(".*")]
    kept = (
        p for p in (place / "tmp").glob("*") if not p.name.startswith("torchinductor")
    )  # PyTorch's own cache
    return hidden + [str(p.relative_to(place)) for p in kept]


@dataclass
class Outcome:
    """One command: kills, what was found wrong, and how the same command ended afterwards."""

    calls: int = 0
    kills: int = 0
    finished: int = 0
    had_finished: int = 0
    faults: list[str] = field(default_factory=list)


def kill(name: str, command: Command, world: Path, points: int, moments: int, draw: random.Random) -> Outcome:
    """All kills of one command."""
    outcome, place = Outcome(), world.with_name("place")
    start = world.with_name("start")
    _copy(world, place)
    if command.kernels:
        shutil.rmtree(place / "cache")
    for earlier in command.before:
        code, _, said = run(place, earlier)
        assert code == 0, f"{name}: {earlier} ended with {code}: {said}"
    _copy(place, start)
    old = {out: digest(place / out) for out in command.outputs if (place / out).exists()}
    began = time.monotonic()
    if command.kernels:
        os.environ["OCTAD_ISA"] = "portable"  # the one that compiles quickest
    code, outcome.calls, said = run(place, command.arguments)
    took = time.monotonic() - began
    assert code == 0, f"{name} ended with {code}: {said}"
    new = {out: digest(place / out) for out in command.outputs}
    chosen: list[tuple[int | None, float | None]] = [(n, None) for n in range(1, outcome.calls + 1)]
    if len(chosen) > points:
        chosen = [chosen[(2 * n + 1) * len(chosen) // (2 * points)] for n in range(points)]  # evenly over all
    chosen += [(None, draw.uniform(0, took)) for _ in range(moments)]
    for die_at, after in chosen:
        _copy(start, place)
        when = f"call {die_at}" if die_at else f"{after:.2f} s"
        code, _, _ = run(place, command.arguments, die_at, after)
        outcome.kills += code == -signal.SIGKILL
        _judge(name, command, place, when, (old, new), outcome)
    shutil.rmtree(place)
    os.environ.pop("OCTAD_ISA", None)
    return outcome


def _judge(
    name: str,
    command: Command,
    place: Path,
    when: str,
    known: tuple[dict[str, str], dict[str, str]],
    outcome: Outcome,
) -> None:
    old, new = known
    for out in command.outputs:
        found = place / out
        if found.exists() and loads(found) and digest(found) not in (old.get(out), new[out]):
            outcome.faults.append(
                f"{name}, killed at {when}: {out} loads and is neither the old nor the new one"
            )
    complete = all((place / out).exists() and digest(place / out) == new[out] for out in command.outputs)
    code, _, said = run(place, command.arguments)
    outcome.finished += code == 0
    outcome.had_finished += code == 2 and complete
    if code and not (code == 2 and complete):
        outcome.faults.append(
            f"{name}, killed at {when}: the same command ends with {code}: {said.strip()[-300:]}"
        )
    elif not (complete and command.edits) and any(digest(place / out) != new[out] for out in command.outputs):
        outcome.faults.append(f"{name}, killed at {when}: the same command makes something else")
    if left := litter(place):
        outcome.faults.append(f"{name}, killed at {when}: left {left[:3]} after {code}")


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def _import_everything() -> None:
    """Before the forks, so that none spends its time on it."""
    import octad

    for module in pkgutil.walk_packages(octad.__path__, "octad."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import torch
    import torch._dynamo  # which optimisers import at first use, for seconds

    torch.set_num_threads(1)
    gc.freeze()  # a fork that collects garbage copies every page


def main() -> None:
    """Kill, tell, and end with 1 where something is amiss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=10**9, help="at most so many calls of each command")
    parser.add_argument("--random", type=int, default=5, help="random moments of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=COMMANDS)
    options = parser.parse_args()
    _import_everything()
    from octad.kernels.compile import load

    draw, faults = random.Random(options.seed), list[str]()
    print(
        f"{'command':<18}{'calls':>7}{'kills':>7}{'finished':>10}{'had finished':>14}{'faults':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="octad-kill-") as directory:
        world = Path(directory) / "world"
        place = Path(directory) / "place"  # where all happens: paths in the files are absolute
        subprocess.run([sys.executable, str(Path(__file__).with_name("world.py")), str(place)], check=True)
        load(place / "cache")  # the kernels: all commands but one find them
        place.rename(world)
        for name in options.only or COMMANDS:
            done = kill(name, COMMANDS[name], world, options.points, options.random, draw)
            row = f"{done.calls:>7}{done.kills:>7}{done.finished:>10}{done.had_finished:>14}{len(done.faults):>8}"
            print(f"{name:<18}{row}", flush=True)
            faults += done.faults
    print("\n".join(faults))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
