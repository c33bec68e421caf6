"""What the tests of this directory run in a process where PyTorch knows the pretended GPU: cases.py ASKED

ASKED is JSON: {"names": [...], "models": {family: directory}, "work": directory}. Prints {name: "" or what went wrong}.
It is a process of its own, since PyTorch asks for its devices when it computes its first gradient, and never again.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pretended_gpu
import torch

MODELS: dict[str, Path] = {}
WORK = Path()
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def main(asked: dict[str, Any]) -> None:
    global WORK
    import cases
    import engine_cases  # noqa: F401  they fill CASES
    import training_cases  # noqa: F401

    torch.set_num_threads(1)
    pretended_gpu.install()
    cases.MODELS.update({family: Path(place) for family, place in asked["models"].items()})
    cases.WORK = Path(asked["work"])
    outcomes = {}
    for name in asked["names"]:
        begun = time.process_time()
        try:
            cases.CASES[name]()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
        print(f"{name}: {time.process_time() - begun:.1f} s", file=sys.stderr)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
