"""Markdown that grows: finished blocks are printed once and for all, only the unfinished one is drawn again and again.

    with GrowingMarkdown(console) as view:
        for delta in deltas: view.add(delta.text)

A block (paragraph, list, table, fence) is finished when the next one begins. What is redrawn is therefore small, never
taller than the screen (of a block that is, the end is shown until it is finished), and the terminal's own scrolling keeps
the rest. Two departures from Markdown, because models do not write it strictly: a line end is a line end (as in
verse), and HTML is text (rich would leave it out).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, Markdown
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from octad.chat.speakers import visible

REDRAW_SECONDS = 1 / 15
DRAWING_SHARE = 0.2  # of the time at most: a long block is drawn less often, so that the model is not held up

STYLES = Theme({"markdown.code": "bold cyan"})  # on whatever ground the terminal has: rich's own is black

Line = list[Segment]


class GrowingMarkdown:
    """The display of one answer; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rest = ""
        self._printed = False
        self._due = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")

    def __enter__(self) -> GrowingMarkdown:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Prints what is left, finished or not."""
        with self._console:
            self._live.update(_Lines([]))
            self._live.stop()
            self._print(self._rest)

    def add(self, text: str) -> None:
        """Show more text, now or with what follows soon."""
        self._rest += visible(text)
        if (started := time.monotonic()) >= self._due:
            self._draw()
            now = time.monotonic()
            self._due = now + max(REDRAW_SECONDS, (now - started) / DRAWING_SHARE)

    def _draw(self) -> None:
        finished, self._rest = split_finished(self._rest)
        lines = self._lines(self._rest, spaced=self._printed or bool(finished.strip()))
        with self._console:  # one write, so that no frame shows half of it
            if finished:
                self._live.update(_Lines([]), refresh=True)
                self._print(finished)
            self._live.update(_Lines(lines[-(self._console.height - 1) :]), refresh=True)

    def _print(self, text: str) -> None:
        if lines := self._lines(text, spaced=self._printed):
            self._console.print(_Lines(lines))
            self._printed = True

    def _lines(self, text: str, spaced: bool) -> list[Line]:
        """The text as lines of the screen, after an empty one where something stands above."""
        lines = render_lines(self._console, text)
        return [[], *lines] if lines and spaced else lines


class _Lines:
    """Lines that are ready to be shown."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            yield from line
            yield Segment.line()


def split_finished(text: str) -> tuple[str, str]:
    """The text up to where its last block begins, and that block, which may still grow.

    A block has begun when its first line is complete: `2` could still become the next item of the list before it."""
    lines = text.split("\n")
    tokens = _parser().parse("\n".join(lines[:-1]))
    starts = [token.map[0] for token in tokens if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", text
    return "\n".join(lines[: starts[-1]]) + "\n", "\n".join(lines[starts[-1] :])


def render_lines(console: Console, text: str) -> list[Line]:
    """Markdown as lines as wide as the screen, without spaces at their ends or empty lines around them."""
    if not text.strip():
        return []
    markdown = _Markdown("", code_theme="ansi_dark", hyperlinks=False)
    markdown.parsed = [_with_line_ends(token) for token in _parser().parse(text)]
    options = console.options.update(height=None)
    with console.use_theme(STYLES):
        lines = [_trimmed(line) for line in console.render_lines(markdown, options, pad=False)]
    shown = [number for number, line in enumerate(lines) if line]
    return lines[shown[0] : shown[-1] + 1] if shown else []


class _Heading(Heading):
    """A heading at the left, where the text is."""

    LEVEL_ALIGN = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Code(CodeBlock):
    """Highlighted code between dim fences, at the left edge so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("```" + ("" if self.lexer_name == "text" else self.lexer_name), style="dim")
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme=self.theme, word_wrap=True)
        yield Text("```", style="dim")


class _Markdown(Markdown):
    elements = {**Markdown.elements, "heading_open": _Heading, "fence": _Code, "code_block": _Code}


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def _with_line_ends(token: Token) -> Token:
    for child in token.children or ():
        if child.type == "softbreak":
            child.type = "hardbreak"
    return token


def _trimmed(line: Line) -> Line:
    """The line without spaces at its end: they would be copied along."""
    while line and not line[-1].text.strip():
        line = line[:-1]
    return [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)] if line else []
