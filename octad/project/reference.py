"""docs/reference.md: every key of every file, out of the pydantic models that read them.

python -m octad.project.reference docs/reference.md          # make reference
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from octad.project.schemas import FILES, models

WHAT = {
    "recipe": "for `octad combine`: what a mixture is made of",
    "branch": "for `octad branch`: specialists to make of one base",
    "train": "for `octad train`: a mixture to tune (`task: tune`), or a model to pre-train (`task: pretrain`)",
    "domains": "for `octad evaluate`: held-out text by domain",
}
SAMPLING = (
    "What a request asks of the sampler, in Python: `octad.SamplingParams(temperature=0.7)`. The server's APIs have the"
    " same under OpenAI's and Anthropic's names."
)
LIMITS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}


def reference() -> str:
    """The page."""
    parts = [
        "# Every key of every file",
        "",
        "Made by `make reference` out of the models that read the files; `octad schema KIND` prints the same as JSON"
        " Schema, by which editors complete and check. Paths are relative to the file that they stand in. `octad init`"
        " writes files that belong together.",
        "",
    ]
    for kind in FILES:
        parts += [f"## {kind}.yaml", "", f"{WHAT[kind][0].upper()}{WHAT[kind][1:]}.", ""]
        told: set[type[Any]] = set()
        for model in models(kind):
            parts += _section("" if len(models(kind)) == 1 else str(_default_of_task(model)), model, told)
    parts += ["## SamplingParams", "", SAMPLING, ""]
    (params,) = models("sampling")
    return "\n".join([*parts, *_section("", params, set())])


def _default_of_task(model: type[BaseModel]) -> str:
    return f"task: {get_args(model.model_fields['task'].annotation)[0]}"


def _section(title: str, model: type[Any], told: set[type[Any]]) -> Iterator[str]:
    """One model's docstring and keys, then those of the sections in it that were not told yet."""
    told.add(model)
    if title:
        yield from (f"### {title}", "")
    if model.__doc__:
        yield from (" ".join(model.__doc__.split()), "")
    yield from ("| key | value | unless said |", "|---|---|---|")
    inner: list[tuple[str, type[Any]]] = []
    for name, field in _fields(model).items():
        if name == "directory":
            continue
        yield f"| `{name}` | {_kind(field)} | {_default(field)} |"
        inner += [(name, part) for part in _models_in(field.annotation)]
    if old := getattr(model, "old_names", {}):
        yield from ("", f"Also read: {', '.join(f'`{a}` for `{b}`' for a, b in old.items())}.")
    yield ""
    for name, part in inner:
        if part not in told:
            yield from _section(f"`{name}`", part, told)


def _fields(model: type[Any]) -> dict[str, FieldInfo]:
    """Of a pydantic model or a dataclass."""
    if issubclass(model, BaseModel):
        return dict(model.model_fields)
    hints = get_type_hints(model, include_extras=True)
    return {
        f.name: FieldInfo.from_annotated_attribute(hints[f.name], None if f.default is MISSING else f.default)
        for f in fields(model)
    }


def _models_in(annotation: Any) -> Iterator[type[Any]]:
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _kind(field: FieldInfo) -> str:
    """What a value is, in words, with its limits."""
    return " ".join([_words(field.annotation), *_limits(field.metadata)]).replace("|", "\\|")


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    for part in metadata:
        for name, words in LIMITS.items():
            if (value := getattr(part, name, None)) is not None:
                yield words.format(f"{value:g}" if isinstance(value, float) else value)


def _words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_words(inside[0]), *_limits(inside[1:])])
    if origin is Literal:
        return ", ".join(f"`{str(v).lower() if isinstance(v, bool) else v}`" for v in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in inside if part is not type(None))
    if origin is tuple:
        return "text or a list of texts" if _words(inside[0]) == "text" else f"a list of {_words(inside[0])}"
    if origin is Sequence:
        return f"a list of {_words(inside[0])}".replace("text", "texts").replace("number", "numbers")
    if origin is Mapping:
        return f"a mapping from {_words(inside[0])} to {_words(inside[1])}".replace("number", "numbers")
    if origin is dict:
        return f"a name for each {_words(inside[1])}"
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return "section"
    return {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "`true`, `false`",
        Path: "path",
        Any: "anything",
    }.get(annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    """What holds where the key is left out."""
    if field.is_required():
        return "**needed**"
    value = field.default if field.default is not PydanticUndefined else None
    if isinstance(value, BaseModel):
        said = value.model_dump(exclude_defaults=True)
        return (
            ", ".join(f"{k}: {v:g}" if isinstance(v, float) else f"{k}: {v}" for k, v in said.items())
            or "its own defaults"
        )
    if value is None or value == ():
        return "nothing"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
