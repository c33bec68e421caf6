"""JSON Schema of the files that people write, and of what a request asks, for editors and programs; and the page of
every key. Pydantic makes both out of the classes that read them.

schema("recipe")                    # plain data; recipe, branch, train, domains, sampling
reference()                         # docs/reference.md
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from octad.errors import RequestError

FILES = ("recipe", "branch", "train", "domains")
KINDS = (*FILES, "sampling")


def models(kind: str) -> list[type[Any]]:
    """The classes that something of this kind can be. Raises RequestError."""
    from octad.combine.recipe import Recipe
    from octad.engine.params import SamplingParams
    from octad.evaluate.domains import DomainsFile
    from octad.train.run_config import BranchConfig, PretrainConfig, TuneConfig

    found: dict[str, list[type[Any]]] = {
        "recipe": [Recipe],
        "branch": [BranchConfig],
        "train": [TuneConfig, PretrainConfig],
        "domains": [DomainsFile],
        "sampling": [SamplingParams],
    }
    if kind not in found:
        raise RequestError(f"schema {kind!r}: found none of that name; there are {', '.join(KINDS)}")
    return found[kind]


def schema(kind: str) -> dict[str, Any]:
    """The JSON Schema of a kind of file: "recipe", "branch", "train" or "domains"; or of SamplingParams: "sampling".
    Raises RequestError.

    >>> sorted(octad.schema("domains")["properties"])
    ['domains']
    """
    kinds: Any = models(kind)
    found = TypeAdapter(kinds[0] if len(kinds) == 1 else kinds[0] | kinds[1]).json_schema(mode="validation")
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"octad {kind}"}
    return title | dict(_without(found, "directory"))


def _without(value: Any, key: str) -> Any:
    """The schema without a field that is no key of the file."""
    if isinstance(value, dict):
        return {
            name: _without({n: v for n, v in part.items() if n != key} if name == "properties" else part, key)
            for name, part in value.items()
        }
    return [_without(part, key) for part in value] if isinstance(value, list) else value
