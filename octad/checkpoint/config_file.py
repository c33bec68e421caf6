"""YAML files that people write: read once and complained of once, here, whatever they describe. Imports no torch.

raw = read_mapping(Path("recipe.yaml"), "recipe recipe.yaml", "base and experts")     # RecipeError in one line
parse_yaml(text)                                                                       # yaml.YAMLError
one_line(error, Recipe)                       # of pydantic's: "unknown key 'router.metod'; did you mean 'method'?"
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from octad.errors import RecipeError

# how pydantic calls the members of a union, in the place of a problem
_KINDS = ("bool", "constrained-int", "constrained-float", "literal['auto']")


class Section(BaseModel):
    """A part of a file: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key that occurs twice is a mistake: the library takes the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See SafeLoader. Raises ConstructorError."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} occurs twice", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Plain data. Raises yaml.YAMLError, also for a key that occurs twice."""
    return yaml.load(text, _OnceLoader)


def read_mapping(path: Path, label: str, expected: str) -> dict[str, Any]:
    """A file of keys and values; `label` begins every complaint, `expected` names keys. Raises RecipeError."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{label}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{label}: expected keys such as {expected}, found {type(raw).__name__}")
    return raw


def one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problem with a file of this kind, in the words of the file; `directory` is a field, but no key."""
    problem = error.errors()[0]
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
