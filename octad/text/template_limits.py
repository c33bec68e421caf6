"""Chat templates with an end: a sandbox for Jinja that also limits time and what a single operation can make.

    environment = BoundedEnvironment(trim_blocks=True, extensions=[...])
    with environment.limited():
        environment.from_string(template).render(...)         # TooMuch after SECONDS of the thread's processor time

Jinja's own sandbox keeps a template from the machine, but lets it count for ever. Here every turn of a loop and every
call of a macro looks at the clock, and what can make anything large out of nothing (`*`, `**`, `%`, `+`, `~`) looks at
its operands first. Time is the thread's own, so that a busy machine refuses nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 1.0  # a long chat through the longest template of the hub takes milliseconds
LARGEST = 1 << 24  # characters or items of one value; bits of a number are this by 64
SOURCE = 1 << 20  # characters of a template; its time to compile grows with them


class TooMuch(Exception):
    """A template wants more time or memory than any chat needs."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An immutable sandboxed environment whose templates come to an end."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for filters, name in ((self.globals, "lipsum"), (self.filters, "wordwrap"), (self.filters, "urlize")):
            filters.pop(name)  # text without end; time that grows with the square of the text
        self._limit = threading.local()  # a thread's time is its own, and so is its limit

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Inside the block templates of this environment have so much processor time, all together."""
        self._limit.until = time.thread_time() + SECONDS
        try:
            yield
        finally:
            self._limit.until = None

    def look_at_the_clock(self) -> str:
        """What loops and macros call; nothing of it is seen. Raises TooMuch."""
        until: float | None = getattr(self._limit, "until", None)
        if until is not None and time.thread_time() > until:
            raise TooMuch("it takes too long; does it have a loop without an end?")
        return ""

    def from_string(self, source: Any, *arguments: Any, **options: Any) -> Template:
        """A template from its text. Raises TooMuch for one that is longer than any template."""
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters")
        return super().from_string(source, *arguments, **options)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The parsed template, with a look at the clock in every loop and macro."""
        tree: nodes.Template = _Joined().visit(super()._parse(source, name, filename))
        look = nodes.EnvironmentAttribute("look_at_the_clock")
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            call = nodes.ExprStmt(nodes.Call(look, [], [], None, None), lineno=node.lineno)
            cast(Any, node).body.insert(0, call)
        return tree

    def join(self, *values: Any) -> str:
        """What `~` makes of its operands. Raises TooMuch."""
        self.look_at_the_clock()
        parts = [str(value) for value in values]
        if sum(map(len, parts)) > LARGEST:
            raise TooMuch("'~' makes a value that is too large")
        return "".join(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result, where its size is that of something that a chat could hold. Raises TooMuch."""
        self.look_at_the_clock()
        if _size(operator, left, right) > LARGEST:
            raise TooMuch(f"{operator!r} makes a value that is too large")
        return super().call_binop(context, operator, left, right)


class _Joined(NodeTransformer):
    """Puts the environment's `join` in the place of `~`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        """Its operands first."""
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join")
        return nodes.Call(join, node.nodes, [], None, None, lineno=node.lineno)


def _size(operator: str, left: Any, right: Any) -> int:
    """Roughly how large a result is; numbers count 64 for each bit."""
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return 64 * left.bit_length() * max(0, right)
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            return 64 * (left.bit_length() + right.bit_length())
        counts = [value if isinstance(value, int) else _length(value) for value in (left, right)]
        return max(0, counts[0]) * max(0, counts[1])
    if operator == "%" and isinstance(left, str):  # a width can be any number
        widths = "".join(c if c.isdigit() else " " for c in left).split()
        return max([len(left), *(int(w[:20]) for w in widths)])
    return _length(left) + _length(right)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0
