"""Tools: which of them the model may call, and how many at once.

    tools = Toolbox.of(tools, tool_choice, parallel)     # ApiError for what makes no sense
    tools.definitions                                    # for the chat template
    tools.grammar(schema, form)                          # for the engine: calls are always JSON of their schema

The form in which a model writes calls is its chat template's (octad.serve.call_forms); what it says is read by
octad.serve.call_parsers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octad.serve.call_forms import CallForm
from octad.serve.replies import ApiError, shown

JSON_CALLS = CallForm()


@dataclass(frozen=True)
class Toolbox:
    """The tools of a request. `choice`: none, auto, required, or a tool's name. `parallel`: whether several calls are
    asked for at once; None: `required` gives one, `auto` as many as the model makes. `allowed`: the names of those that
    may be called, where not all may."""

    definitions: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    parallel: bool | None = None
    allowed: frozenset[str] | None = None

    @classmethod
    def of(
        cls, tools: Sequence[Any] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
    ) -> Toolbox:
        """From OpenAI's fields. Raises ApiError for a tool or a choice that makes no sense."""
        found = tuple(_checked(tool, place) for place, tool in enumerate(tools or ()))
        names = [tool["function"]["name"] for tool in found]
        wanted, allowed = _choice(choice)
        if wanted == "none" or (not found and wanted == "auto" and allowed is None):
            return cls((), "none", parallel)
        if not found:
            raise ApiError(400, f"tool_choice: found {wanted!a}, but there are no tools", param="tool_choice")
        called = [wanted[1:]] if wanted.startswith("=") else sorted(allowed or ())
        if unknown := [name for name in called if name not in names]:
            raise ApiError(400, f"tool_choice: no tool is called {unknown[0]!a}", param="tool_choice")
        return cls(found, wanted, parallel, allowed)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tools that may be called."""
        return tuple(tool["function"]["name"] for tool in self.callable)

    @property
    def callable(self) -> tuple[Mapping[str, Any], ...]:
        """The tools that the choice allows."""
        if self.choice.startswith("="):
            return tuple(tool for tool in self.definitions if tool["function"]["name"] == self.choice[1:])
        allowed = self.allowed
        return tuple(t for t in self.definitions if allowed is None or t["function"]["name"] in allowed)

    @property
    def forced(self) -> bool:
        """Whether the answer is a call and nothing else."""
        return self.choice not in ("auto", "none")

    def grammar(self, schema: str | None = None, form: CallForm = JSON_CALLS) -> str:
        """In Lark's syntax: calls, and with `auto` text around them (or, with `schema`, JSON of it in their place)."""
        parallel = False if self.choice.startswith("=") else self.parallel
        return form.grammar(self.callable, forced=self.forced, parallel=parallel, schema=schema)


def _choice(choice: str | Mapping[str, Any] | None) -> tuple[str, frozenset[str] | None]:
    """auto, none, required, or =NAME; and the names that may be called, where not all may."""
    if choice is None or choice in ("auto", "none", "required"):
        return str(choice or "auto"), None
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            inner = choice.get("allowed_tools", choice)
            names = [_name_of(tool) for tool in _listed(inner, "tools")]
            if names and None not in names and inner.get("mode", "auto") in ("auto", "required"):
                return str(inner.get("mode", "auto")), frozenset(filter(None, names))
        elif (name := _name_of(choice)) is not None:
            return f"={name}", None
    raise ApiError(
        400,
        f"tool_choice: found {shown(choice)}, allowed: auto, none, required, or an object that names functions",
        param="tool_choice",
    )


def _name_of(given: Any) -> str | None:
    """The function that an object of either API names."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _listed(given: Any, key: str) -> list[Any]:
    found = given.get(key) if isinstance(given, Mapping) else None
    return found if isinstance(found, list) else []


def _checked(tool: Any, place: int) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise ApiError(
            400,
            f"tools[{place}]: should be an object of type 'function', with an object under 'function'",
            param="tools",
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.:-]{1,128}", name):
        raise ApiError(
            400,
            f"tools[{place}].function.name: found {ascii(name)[:100]}, allowed: letters, digits, _ and -",
            param="tools",
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ApiError(400, f"tools[{place}].function.parameters: should be a JSON schema", param="tools")
    return dict(tool)
