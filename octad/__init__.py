"""octad: one mixture-of-experts language model out of eight smaller ones.

    import octad

    mixture = octad.combine("recipe.yaml", "mixture")
    octad.evaluate(mixture, "domains.yaml")                # in a notebook: the verdict in a sentence and a table
    octad.LLM(mixture).chat([{"role": "user", "content": "Hello"}]).outputs[0].text

What the command line does is a function here, too: `octad.init`, `make`, `check`, `combine`, `edit_expert`, `branch`,
`train`, `evaluate`, `inspect`, `export`, `quantize`, `schema`. `LLM`, `SamplingParams` and `StructuredOutput` ask a
model. All are found when they are first asked for: `import octad` loads neither torch nor anything else.

Some of these names are those of rooms as well (octad/combine/ holds what combining is made of). Such a package can be
called: `octad.combine(...)` is the function, `octad.combine.recipe` the module, whichever was imported first.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octad.api.forms import export, quantize
    from octad.api.outcomes import Verdict, Written
    from octad.api.verbs import branch, check, combine, edit_expert, inspect, train
    from octad.api.verdicts import evaluate
    from octad.engine.llm import LLM
    from octad.engine.params import SamplingParams, StructuredOutput
    from octad.errors import OctadError
    from octad.project.begin import init
    from octad.project.road import make
    from octad.project.schemas import schema

    __version__: str

__all__ = [
    "LLM",
    "OctadError",
    "SamplingParams",
    "StructuredOutput",
    "Verdict",
    "Written",
    "__version__",
    "branch",
    "check",
    "combine",
    "edit_expert",
    "evaluate",
    "export",
    "init",
    "inspect",
    "make",
    "quantize",
    "schema",
    "train",
]

_PLACES = {
    "LLM": "engine.llm",
    "SamplingParams": "engine.params",
    "StructuredOutput": "engine.params",
    "OctadError": "errors",
    "Verdict": "api.outcomes",
    "Written": "api.outcomes",
    "evaluate": "api.verdicts",
    "export": "api.forms",
    "quantize": "api.forms",
    "init": "project.begin",
    "make": "project.road",
    "schema": "project.schemas",
} | dict.fromkeys(("branch", "check", "combine", "edit_expert", "inspect", "train"), "api.verbs")
_ROOMS = ("combine", "evaluate", "export", "train")  # which are packages, too


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("octad")
    if name in _ROOMS:
        return import_module(f"octad.{name}")
    if name in _PLACES:
        return getattr(import_module(f"octad.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


class _Room(ModuleType):
    """A package that is called as the function of its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._verb()(*args, **options)

    def _verb(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"octad.{_PLACES[name]}"), name)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(self._verb())


class _Octad(ModuleType):
    """The package itself: a room of a verb's name becomes one that can be called when it is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Octad
