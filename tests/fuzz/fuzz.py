"""Damage every kind of file that octad reads, many times, and see that each is read rightly or refused in one line.

    make fuzz                                  # 10,000 mutations, seed 0; about a quarter of an hour on two cores
    make fuzz COUNT=500 SEED=1
    python tests/fuzz/fuzz.py --count 500 --only recipe.yaml

Each mutation is read in a child process with 12 GB of address space and SECONDS for each file (of which half must be the
processor's, or PATIENCE times as many); a child that hangs or
crashes is replaced. Ends with a table: read, refused (an OctadError, shown as one line), uncaught, hung, crashed; and
with exit code 1 where the last three are not zero. The same seed gives the same damage.
"""

import argparse
import os
import random
import resource
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path[:0] = [str(Path(__file__).parent)]

from damaged_files import READERS  # noqa: E402
from mutate import mutated  # noqa: E402

SECONDS, PATIENCE, ADDRESS_SPACE = 10, 6, 12 << 30
OUTCOMES = ("read", "refused", "uncaught", "hung", "crashed")


def cases(count: int, seed: int, only: list[str]) -> list[tuple[str, int]]:
    """A kind of file and the seed of its damage, in turn over all kinds."""
    return [(only[n % len(only)], seed * 1_000_003 + n) for n in range(count)]


def outcome(directory: Path, name: str, seed: int) -> str:
    """What becomes of one damaged file, with what was said."""
    from octad.errors import OctadError

    reader, path = READERS[name], next(iter(sorted(directory.glob(name.split()[0]))))
    whole = path.read_bytes()
    path.write_bytes(mutated(whole, random.Random(seed), reader.kind))
    try:
        reader.read(directory)
        return "read"
    except OctadError as error:
        said = str(error)
        if "\n" in said or len(said) > 2000:
            return f"uncaught: more than one line: {said[:300]!r}"
        try:
            said.encode()
        except UnicodeEncodeError:
            return f"uncaught: cannot be printed: {said[:300]!r}"
        return "refused"
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = next((f for f in reversed(frames) if "/octad/" in f.filename), frames[-1])
        return f"uncaught: {type(error).__name__}: {str(error)[:200]!r} at {Path(own.filename).name}:{own.lineno}"
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)


def child(directory: Path, work: list[tuple[str, int]], tell: int) -> None:
    """Reads one file after another, one line each into the pipe; never comes back."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for name, seed in work:
        line = outcome(directory, name, seed).replace("\n", " ")
        os.write(tell, line.encode("utf-8", "backslashreplace")[:4000] + b"\n")
    os._exit(0)


def run(directory: Path, work: list[tuple[str, int]]) -> list[str]:
    """The outcomes of all, whatever happens to the children."""
    found: list[str] = []
    while len(found) < len(work):
        told, tell = os.pipe()
        pid = os.fork()
        if not pid:
            child(directory, work[len(found) :], tell)
        os.close(tell)
        with os.fdopen(told, "rb", buffering=0) as lines:
            buffer = b""
            while len(found) < len(work):
                began, piece = _processor_seconds(pid), None
                for _ in range(PATIENCE):  # on a busy machine a child has to wait for others
                    if select.select([lines], [], [], SECONDS)[0]:
                        piece = lines.read(1 << 16)
                        break
                    if _processor_seconds(pid) - began > SECONDS / 2:
                        break
                if not piece:
                    found.append("hung" if piece is None else "crashed")
                    break
                *whole, buffer = (buffer + piece).split(b"\n")
                found += [line.decode() for line in whole]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if len(found) < len(work):
            _restore(directory)
    return found


def _processor_seconds(pid: int) -> float:
    """What a process has used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _restore(directory: Path) -> None:
    """The world as it was, after a child died with a damaged file in it."""
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    subprocess.run(["cp", "-a", str(directory) + ".whole", str(directory)], check=True)


def main() -> None:
    """Damage, read, tell; ends with 1 where something is amiss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=READERS)
    options = parser.parse_args()
    import torch

    import octad.cli.main  # noqa: F401  (before the forks)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="octad-fuzz-") as place:
        directory = Path(place) / "world"
        make = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        make += (
            f"from pathlib import Path\nimport damaged_files\ndamaged_files.seeds(Path({str(directory)!r}))"
        )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(
            [sys.executable, "-c", make],
            check=True,
            **quiet,
        )
        subprocess.run(["cp", "-a", str(directory), f"{directory}.whole"], check=True)
        work = cases(options.count, options.seed, options.only or list(READERS))
        found = run(directory, work)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, _), line in zip(work, found, strict=True):
        table[name][line.split(":")[0]] += 1
    print(f"{'file':<40}" + "".join(f"{what:>10}" for what in OUTCOMES))
    for name, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{name:<40}" + "".join(f"{counts[what]:>10}" for what in OUTCOMES))
    wrong = [(case, line) for case, line in zip(work, found, strict=True) if line not in ("read", "refused")]
    for (name, seed), line in wrong[:50]:
        print(f"{name} (damage {seed}): {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
