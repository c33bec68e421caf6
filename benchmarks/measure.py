"""What the benchmarks share: time and memory of a command, the machine's description, the file of results.

    run(["octad", "combine", "recipe.yaml", "-o", "out"])     # {"seconds": ..., "cpu_seconds": ..., "peak_bytes": ...}

A process's peak memory, as the kernel counts it, begins with that of whoever started it. So commands are started by a
small process of their own: this file, run as a script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STARTED = time.monotonic()


def run(command: Sequence[str | Path], **environment: str) -> dict[str, float]:
    """Carry out a command; seconds, CPU seconds and peak resident bytes. Ends the benchmark where it fails."""
    with tempfile.NamedTemporaryFile("r") as report:
        starter = [sys.executable, __file__, report.name, *map(str, command)]
        subprocess.run(starter, check=True, stdout=sys.stderr, env=os.environ | environment)
        return dict(json.load(report))


def by_document(values: Sequence[float], windows: Sequence[Any]) -> Any:
    """Sums of windows' values over each document, float64 [documents], in the documents' order."""
    import numpy as np

    documents = np.array([w.document for w in windows])
    return np.array(
        [np.asarray(values, dtype=np.float64)[documents == d].sum() for d in np.unique(documents)]
    )


def starter(report: str, command: Sequence[str]) -> int:
    """Start, wait, write down; returns the command's exit status."""
    begun = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    found = {
        "seconds": round(time.perf_counter() - begun, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    Path(report).write_text(json.dumps(found))
    return os.waitstatus_to_exitcode(status)


def hardware() -> dict[str, Any]:
    """What octad bench tells of the machine, torch's version, the kernels' instruction set and the load."""
    import torch

    from octad import machine
    from octad.kernels.compile import isa

    found = machine.hardware(torch.device("cpu"))
    load = round(os.getloadavg()[0], 2)
    return found | {"torch": torch.__version__, "kernels": isa(), "load_average_at_end": load}


def command_line() -> str:
    """This benchmark's command, paths without their directories."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])])


def tell(text: str) -> None:
    """One line of progress on stderr."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def save(out: Path, results: dict[str, Any]) -> None:
    """Write what is known so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(starter(sys.argv[1], sys.argv[2:]))
