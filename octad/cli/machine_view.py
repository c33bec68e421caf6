"""`octad inspect --machine`: what the processor has, and which of the native kernels' paths it takes.

rich.print(render(machine()))
"""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType

from octad.figures import human
from octad.report import terminal


def machine() -> dict[str, Any]:
    """The hardware as `octad bench` tells it, with the kernels: the path in use, those that run here, those there are, or
    why there are none. Raises IsaError."""
    import torch

    from octad.kernels.compile import BuildError, isa_flags, load, runnable
    from octad.machine import hardware

    try:
        used, reason = load().isa, None
    except BuildError as error:
        used, reason = None, str(error)
    kernels = {"used": used, "reason": reason, "run_here": runnable(), "known": list(reversed(isa_flags()))}
    return hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {"kernels": kernels}


def render(found: dict[str, Any]) -> RenderableType:
    """A few lines of facts."""
    kernels = found["kernels"]
    others = [name for name in kernels["run_here"] if name != kernels["used"]]
    lacks = [name for name in kernels["known"] if name not in kernels["run_here"]]
    facts = {
        "processor": f"{found['cpu']}, {found['cores']} cores, {human(found['memory_bytes'], 'B')}",
        "has": ", ".join(found["instruction_sets"]) or "none of the instruction sets that the kernels know",
        "kernels": kernels["used"] or f"none: {kernels['reason']}",
        "also run here": ", ".join(others) + " (OCTAD_ISA=NAME)" if others else "",
        "not here": ", ".join(lacks),
        "GPU": found.get("gpu", ""),
    }
    return terminal.facts((name, text) for name, text in facts.items() if text)
