"""octad: one mixture-of-experts language model out of eight smaller ones.

    from octad import LLM, SamplingParams

These two are found when they are first asked for, so that `import octad` loads neither torch nor anything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.params import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from octad.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from octad.engine.params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
