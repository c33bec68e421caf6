"""YAML files that people write: read once and complained of once, here, whatever they describe. Imports no torch.

class Recipe(ConfigFile): ...                                                  # and its parts: Section
raw = read_mapping(path, "recipe recipe.yaml", "base and experts")             # RecipeError in one line
Recipe.from_dict(raw, path.parent, "recipe recipe.yaml")          # "unknown key 'router.metod'; did you mean 'method'?"
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from octad.errors import RecipeError, nearest
from octad.guard import YAML_BYTES, exists, parse_yaml

_ORDER = {"extra_forbidden": 0, "missing": 2}  # which of several problems is told; the others are 1
# how pydantic calls the members of a union, in the place of a problem
_KINDS = ("bool", "constrained-int", "constrained-float", "literal['auto']")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Text = Annotated[str, Field(min_length=1)]
StringList = Annotated[
    tuple[_Text, ...], BeforeValidator(_as_list, json_schema_input_type=_Text | tuple[_Text, ...])
]


class OldName(FutureWarning):
    """A key that has another name now. It is still read; the command line tells it in one line."""


class Section(BaseModel):
    """A part of a file: immutable, and an unknown key is an error. `old_names`: what keys were called before, or are
    called in files of other tools, -> what they are called here; both at once are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    old_names: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def checked(cls, raw: Mapping[str, Any], label: str) -> Self:
        """Plain data as this section. Raises RecipeError: one line that begins with `label`."""
        try:
            context = {"label": label, "directory": raw.get("directory", Path())}
            return cls.model_validate(raw, context=context)
        except ValidationError as error:
            raise RecipeError(f"{label}: {one_line(error, cls)}") from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take true (in YAML also yes and on) for 1."""
        if isinstance(value, bool) and not _takes_flags(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"expected another kind of value than {str(value).lower()}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, raw: Any, info: ValidationInfo) -> Any:
        found = [old for old in cls.old_names if isinstance(raw, Mapping) and old in raw]
        for old in found:
            new = cls.old_names[old]
            if new in raw:
                raise ValueError(f"has {new!r} and {old!r}, which are two names of one thing; keep {new!r}")
            where = info.context["label"] if info.context else cls.__name__
            warnings.warn(f"{where}: {old!r} is called {new!r} here", OldName, stacklevel=2)
            raw = {new if key == old else key: value for key, value in raw.items()}
        return raw


def _takes_flags(annotation: Any) -> bool:
    """Whether true and false are among what a field's annotation allows."""
    return (
        annotation in (bool, Any)
        or isinstance(annotation, bool)
        or any(map(_takes_flags, get_args(annotation)))
    )


class ConfigFile(Section):
    """A whole file. `directory` is where it lies, which its paths are relative to; it is not a key."""

    directory: Path = Field(default=Path(), exclude=True)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], directory: Path, label: str = "") -> Self:
        """Plain data as this file. Raises RecipeError with one line for whatever is wrong."""
        label = label or cls.__name__.lower()
        if "directory" in raw:
            raise RecipeError(f"{label}: unknown key 'directory'; paths are relative to the file's own")
        return cls.checked({**raw, "directory": directory}, label)

    def resolve(self, reference: str) -> str:
        """A reference as the user wrote it, made a path where a file of that name exists beside this one; a pattern of
        names is one beside it too."""
        beside = self.directory / Path(reference).expanduser()
        pattern = has_magic(reference) and not reference.startswith("hf:")
        return str(beside) if pattern or exists(beside) else reference


def distinct(kind: str, names: Sequence[str]) -> None:
    """Raises ValueError, for a validator to raise, where two of a list have the same name."""
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise ValueError(f"two {kind} have the name {twice!r}; give each its own")


def read_mapping(path: Path, label: str, expected: str) -> dict[str, Any]:
    """A file of keys and values; `label` begins every complaint, `expected` names keys. Raises RecipeError."""
    try:
        with open(path, "rb") as file:
            raw = parse_yaml(file.read(YAML_BYTES + 1))  # no more, of what may have no end
    except FileNotFoundError:
        raise RecipeError(
            f"{label}: cannot be read: there is no such file; `octad init` writes those that belong together"
        ) from None
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{label}: expected keys such as {expected}, found {type(raw).__name__}")
    return raw


def yaml_reason(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the parser's picture of the place."""
    if not isinstance(error, yaml.MarkedYAMLError) or (mark := error.problem_mark) is None:
        return " ".join(str(error).split())
    context = f"{error.context}: " if error.context else ""
    return f"{context}{error.problem}, line {mark.line + 1}, column {mark.column + 1}"


def one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    """The gravest problem with a file of this kind, in the words of the file: a key that does not exist before whatever
    else, and one that is missing (it may be the misspelt one) last. `directory` is a field, but no key."""
    problem = min(error.errors(), key=lambda e: _ORDER.get(e["type"], 1))
    where = [str(part) for part in problem["loc"] if part not in _KINDS]
    if problem["type"] == "extra_forbidden":
        section = _section(kind, problem["loc"][:-1])
        keys = [key for key in section.model_fields if key != "directory"]
        return _unknown_key(where, keys, getattr(section, "old_names", {}))
    if problem["type"] == "missing":
        return f"key {'.'.join(where)!r} is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if len(where) < len(problem["loc"]):  # of a key that may be one of several kinds
        same = [e["msg"] for e in error.errors() if e["loc"][: len(where)] == problem["loc"][: len(where)]]
        message = " or ".join(same)
    if problem["type"] in ("model_type", "model_attributes_type"):
        message = "expected keys and values"
    if not where:
        return message
    found = repr(problem["input"])
    return f"{'.'.join(where)}: {message}, found {found if len(found) <= 80 else found[:77] + '...'}"


def _section(kind: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The section that a place in the file belongs to."""
    for part in place:
        if isinstance(part, str):
            annotation = kind.model_fields[part].annotation
            inner = getattr(annotation, "__args__", (annotation,))[0]
            kind = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else kind
    return kind


def _unknown_key(where: Sequence[str], known: Sequence[str], old: Mapping[str, str]) -> str:
    """What to say of a key that there is not: the nearest one that exists, or all of them."""
    near = nearest(where[-1], [*known, *old])
    if near is None:
        hint = f"known keys: {', '.join(known)}"
    else:
        hint = f"did you mean {near!r}{f', which is called {old[near]!r} here' if near in old else ''}?"
    return f"unknown key {'.'.join(where)!r}; {hint}"
