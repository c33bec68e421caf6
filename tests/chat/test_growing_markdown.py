"""Markdown that grows: whatever the pieces, the screen ends up as if the text had been there at once."""

import io
import random

import pyte
import pytest
from rich.console import Console

from octad.chat import growing_markdown as markdown
from octad.chat.growing_markdown import GrowingMarkdown, render_lines, split_finished

TEXT = """# Title

Some *words* with `code`, <b>tags</b>
and a second line.

1. first

2. second
   - inner

```python
def f(n):
    return n + 1

# no heading, and no end of the block
```

| a | b |
|---|---|
| 1 | 2 |

Underlined
---

> quoted
> twice

***

The end\x1b[2J"""


class Terminal(io.StringIO):
    """A terminal: what is written is carried out by pyte, lines that leave the screen are kept."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(width, height, history=1000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def visible(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def everything(self) -> list[str]:
        """All lines, without the empty ones."""
        gone = ("".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top)
        return [line.rstrip() for line in [*gone, *self.screen.display] if line.strip()]


def open_console(height: int, width: int = 60) -> tuple[Console, Terminal]:
    terminal = Terminal(width, height)
    return Console(
        file=terminal, force_terminal=True, width=width, height=height, legacy_windows=False
    ), terminal


def pieces(text: str, seed: int) -> list[str]:
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, len(text)), 40))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.fixture(autouse=True)
def _draw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "REDRAW_SECONDS", 0.0)
    monkeypatch.setattr(markdown, "DRAWING_SHARE", float("inf"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("height", [8, 50])
def test_in_pieces_as_at_once(seed: int, height: int) -> None:
    at_once, whole = open_console(height)
    with GrowingMarkdown(at_once) as view:
        view.add(TEXT)
    growing, terminal = open_console(height)
    with GrowingMarkdown(growing) as view:
        for piece in pieces(TEXT, seed):
            view.add(piece)
    assert terminal.everything() == whole.everything()
    shown = "\n".join(whole.everything())
    for part in (
        "Title",
        "<b>tags</b>\nand a second line.",
        " 2 second",
        "```python\ndef f(n):",
        "▌ twice",
        "\ufffd[2J",
    ):
        assert part in shown


@pytest.mark.parametrize("seed", range(4))
def test_a_split_loses_nothing_and_cuts_between_blocks(seed: int) -> None:
    rest, finished = "", []
    for piece in pieces(TEXT, seed):
        done, rest = split_finished(rest + piece)
        finished += [done] if done else []
    assert "".join(finished) + rest == TEXT
    assert all(block.count("```") != 1 for block in finished)
    assert any("1. first\n\n2. second\n   - inner" in block for block in finished)


def test_a_block_taller_than_the_screen_shows_its_end() -> None:
    console, terminal = open_console(height=6)
    with GrowingMarkdown(console) as view:
        view.add("```\n")
        for number in range(30):
            view.add(f"line {number}\n")
        assert terminal.visible()[:5] == ["line 26", "line 27", "line 28", "line 29", "```"]
    assert terminal.everything() == ["```", *(f"line {number}" for number in range(30)), "```"]


def test_an_exception_leaves_what_was_said() -> None:
    console, terminal = open_console(height=6)
    view = GrowingMarkdown(console)
    view.__enter__()
    view.add("half a sen")
    assert not view.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert terminal.everything() == ["half a sen"]


def test_code_is_coloured_and_stands_at_the_left_edge() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=40, color_system="standard")
    lines = render_lines(console, "```python\ndef f():\n\tpass\n```")
    assert ["".join(s.text for s in line) for line in lines] == ["```python", "def f():", "    pass", "```"]
    assert any(segment.style and segment.style.color for segment in lines[1])
