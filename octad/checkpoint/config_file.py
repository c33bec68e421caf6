"""YAML files that people write: read once, here, whatever they describe. Imports no torch.

raw = read_mapping(Path("recipe.yaml"), "recipe recipe.yaml", "base and experts")     # RecipeError in one line
parse_yaml(text)                                                                       # yaml.YAMLError
unknown_key(["router", "metod"], ["method", "tokens"])          # "unknown key 'router.metod'; did you mean ..."
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from octad.errors import RecipeError


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


def unknown_key(where: Sequence[str], known: Sequence[str]) -> str:
    """What to say of a key that there is not: the nearest one that exists, or all of them."""
    near = difflib.get_close_matches(where[-1], known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(where)!r}; {hint}"
