"""Who speaks: each word of an answer in the colour of the expert that had the most say in it, and each expert's share.

    speak(llm, ids, SamplingParams(routed_experts=True), console)                # the whole answer, as it comes
    words = Words()                                                              # or step by step:
    for delta in deltas: write(console, words.add(delta))
    write(console, words.rest())
    console.print(legend(["general", "french"], Counter({0: 30, 1: 10})))        # general 75%  french 25%

A word is often several tokens, and they can have different speakers; the majority has it, so that no word is
two-coloured. Text can come later than its tokens (half a character, what may become a stop string): their votes wait.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from octad.errors import RequestError, nearest
from octad.figures import percent
from octad.report import terminal

if TYPE_CHECKING:
    from octad.engine.llm import LLM
    from octad.engine.opened import Opened
    from octad.engine.outputs import Delta, RequestOutput
    from octad.engine.params import SamplingParams

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def encode(llm: LLM | Opened, text: str, *, chat: bool = False) -> list[int]:
    """Ids of a prompt: the text itself, control tokens' spellings as plain text, or through the chat template."""
    if chat:
        return llm.tokenizer.encode_chat([{"role": "user", "content": text}])
    return llm.tokenizer.encode_prompt(text)


def speak(
    llm: LLM, prompt: Sequence[int], params: SamplingParams, console: Console, before: str = ""
) -> RequestOutput:
    """Print the answer (of several, the first) as it comes, each word in its speaker's colour; returns all there is.
    `before`: text that stands before it on the screen.

    Raises RequestError for a prompt that the model cannot take."""
    words, stream, flow = Words(), llm.submit(prompt, params), Flow(console, before)
    try:
        for delta in stream:
            if delta.index == 0:
                flow.write(words.add(delta))
        return stream.output()
    finally:
        stream.close()
        flow.write([*words.rest(), Word("\n", None)])


@dataclass(frozen=True)
class Word:
    """A piece of text that is shown at once; speaker is None for a dense model."""

    text: str
    speaker: int | None


class Words:
    """From deltas to words; a word comes out once the next one begins."""

    def __init__(self) -> None:
        self._text = ""
        self._votes: Counter[int] = Counter()
        self._waiting: tuple[int, ...] = ()  # votes whose text has not come yet

    def add(self, delta: Delta) -> Iterator[Word]:
        """The word that this delta shows to be complete, if any."""
        self._waiting += delta.speakers or ()
        if not delta.text:
            return
        if self._text and not delta.text[0].isalnum():
            yield from self.rest()
        self._text += delta.text
        self._votes.update(self._waiting)
        self._waiting = ()
        if not self._votes:  # a dense model: nothing to vote on, so nothing to wait for
            yield from self.rest()

    def rest(self) -> Iterator[Word]:
        """What has not come out yet."""
        if self._text:
            yield Word(self._text, max(self._votes, key=self._votes.__getitem__, default=None))
        self._text, self._votes = "", Counter()


def write(console: Console, words: Iterable[Word]) -> None:
    """Print words in their colours, exactly as they are: no wrapping, no markup, tabs kept; in a pipe, the bare text."""
    for word in words:
        style = None if word.speaker is None else Style.parse(terminal.speaker_style(word.speaker))
        text = visible(word.text) if console.is_terminal else word.text
        console.print(Segments([Segment(text, style)]), end="", crop=False)


class Flow:
    """Words as they come, at a terminal with a new line before one that has no room left; `before` is what stands on the
    screen already. Of a word longer than the screen is wide the terminal makes what it can."""

    def __init__(self, console: Console, before: str = "") -> None:
        self._console = console
        self._column = _column(before, 0) % console.width

    def write(self, words: Iterable[Word]) -> None:
        """Print them."""
        for word in words:
            if self._console.is_terminal:
                first = visible(word.text).partition("\n")[0]
                room = self._console.width - self._column
                if (
                    self._column
                    and room < cell_len(first.rstrip())
                    and cell_len(first.strip()) <= self._console.width
                ):
                    write(self._console, [Word("\n", None)])
                    word, self._column = Word(word.text.lstrip(" "), word.speaker), 0
                self._column = _column(visible(word.text), self._column)
            write(self._console, [word])


def _column(text: str, start: int) -> int:
    """Where the cursor is after a text that was begun at a column."""
    last = text.rpartition("\n")[2]
    return cell_len(last.expandtabs(8)) + (0 if "\n" in text else start)


def write_prompt(console: Console, text: str) -> None:
    """Print what was given to the model, dim."""
    console.print(Segments([Segment(visible(text), Style(dim=True))]), end="", crop=False)


def expert_number(llm: LLM | Opened, name: str) -> int:
    """The number of an expert by its name. Raises RequestError, with the nearest name, for one that is not there."""
    if llm.expert_names and name not in llm.expert_names:
        raise RequestError(f"{name}: no such expert; {hint(name, llm.expert_names)}")
    return llm.expert_number(name)


def hint(name: str, known: Iterable[str]) -> str:
    """The known name that comes nearest to one in any case, as it is typed, or all of them."""
    names = list(known)
    near = nearest(name.lower(), names)
    return f"did you mean {near}?" if near else f"there are {', '.join(names)}"


def visible(text: str) -> str:
    """The text with control characters, which could move the cursor or worse, as U+FFFD; tabs and line ends stay."""
    return CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def legend(names: Sequence[str], speakers: Counter[int] | None = None) -> Text:
    """The experts' names in their colours; of those that had a say in an answer, with their shares of its tokens."""
    parts = []
    for expert, name in enumerate(names):
        share = f" {percent(speakers[expert] / speakers.total())}" if speakers else ""
        if not speakers or speakers[expert]:
            parts.append(Text(name + share, style=terminal.speaker_style(expert)))
    return Text("  ").join(parts)
