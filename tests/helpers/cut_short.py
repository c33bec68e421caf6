"""octad combine that writes its journal behind every layer, and is killed at a moment: cut_short.py CALLS octad's
arguments

SIGKILL comes before call number CALLS (of all that write files) of process 0; with CALLS 0 it runs to its end. The
last line of stdout is the number of calls."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from octad.checkpoint import extent, row_writer, writer
from octad.cli.main import main
from octad.combine import journal

CALLS = [0]


def counted(call: Callable[..., Any], die_at: int) -> Callable[..., Any]:
    def instead(*arguments: Any, **options: Any) -> Any:
        CALLS[0] += 1
        if CALLS[0] == die_at and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)

    return instead


if __name__ == "__main__":
    die_at = int(sys.argv.pop(1))
    journal.EVERY = 0.0
    for module in (extent, row_writer, writer):
        module.write_all = counted(extent.write_all if module is extent else module.write_all, die_at)
    os.fsync = counted(os.fsync, die_at)
    os.replace = counted(os.replace, die_at)
    os.rename = counted(os.rename, die_at)
    try:
        main()
    finally:
        print(CALLS[0])
