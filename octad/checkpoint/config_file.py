"""YAML files that people write: read once and complained of once, here, whatever they describe. Imports no torch.

class Recipe(ConfigFile): ...                                                  # and its parts: Section
raw = read_mapping(path, "recipe recipe.yaml", "base and experts")             # RecipeError in one line
Recipe.from_dict(raw, path.parent, "recipe recipe.yaml")          # "unknown key 'router.metod'; did you mean 'method'?"
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from octad.errors import RecipeError
from octad.guard import exists, parse_yaml

_ORDER = {"extra_forbidden": 0, "missing": 2}  # which of several problems is told; the others are 1
# how pydantic calls the members of a union, in the place of a problem
_KINDS = ("bool", "constrained-int", "constrained-float", "literal['auto']")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StringList = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A part of a file: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, raw: Mapping[str, Any], label: str) -> Self:
        """Plain data as this section. Raises RecipeError: one line that begins with `label`."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"{label}: {one_line(error, cls)}") from None


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
        raw = parse_yaml(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{label}: expected keys such as {expected}, found {type(raw).__name__}")
    return raw


def one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    """The gravest problem with a file of this kind, in the words of the file: a key that does not exist before whatever
    else, and one that is missing (it may be the misspelt one) last. `directory` is a field, but no key."""
    problem = min(error.errors(), key=lambda e: _ORDER.get(e["type"], 1))
    where = [str(part) for part in problem["loc"] if part not in _KINDS]
    if problem["type"] == "extra_forbidden":
        keys = [key for key in _section(kind, problem["loc"][:-1]).model_fields if key != "directory"]
        return _unknown_key(where, keys)
    if problem["type"] == "missing":
        return f"key {'.'.join(where)!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
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


def _unknown_key(where: Sequence[str], known: Sequence[str]) -> str:
    """What to say of a key that there is not: the nearest one that exists, or all of them."""
    near = difflib.get_close_matches(where[-1], known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(where)!r}; {hint}"
