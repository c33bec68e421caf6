"""Words and their colours: nothing of the text is lost, a word has one colour, a pipe gets the bare text."""

import io
from collections import Counter

import pytest
from rich.console import Console

from octad.chat.speakers import Flow, Word, Words, legend, visible, write
from octad.engine.outputs import Delta


def delta(text: str, *speakers: int) -> Delta:
    return Delta("r", 0, text, (0,) * max(1, len(speakers)), speakers=speakers or None)


def words(*deltas: Delta) -> list[Word]:
    gather = Words()
    return [word for d in deltas for word in gather.add(d)] + list(gather.rest())


def test_the_majority_has_the_word() -> None:
    found = words(delta("Win", 2), delta("ter", 2), delta("zeit", 1), delta(" in", 0), delta(" P", 1))
    assert found == [Word("Winterzeit", 2), Word(" in", 0), Word(" P", 1)]


def test_votes_wait_for_their_text() -> None:
    """The first two of three tokens make half a character each; the whole comes with the third."""
    found = words(delta(" a", 0), delta("", 1), delta("", 1), delta("€", 2), delta(" b", 2))
    assert found == [Word(" a", 0), Word("€", 1), Word(" b", 2)]


def test_nothing_is_lost() -> None:
    pieces = ["\n\n", "def", " f", "(", "", "x", "):", "\n\t", "return", " x", "é", "…", ""]
    found = words(*(delta(piece, i % 3) for i, piece in enumerate(pieces)))
    assert "".join(word.text for word in found) == "".join(pieces)


def test_a_dense_model_streams_each_piece_at_once() -> None:
    gather = Words()
    assert [list(gather.add(delta(text))) for text in ("Win", "ter")] == [
        [Word("Win", None)],
        [Word("ter", None)],
    ]


@pytest.mark.parametrize(
    ("terminal", "expected"), [(False, "a\t\x1b[2Jb\r\n c"), (True, "\x1b[32ma\t\ufffd[2Jb\n c\x1b[0m")]
)
def test_control_characters_reach_no_terminal(terminal: bool, expected: str) -> None:
    """In a pipe the text is exact; at a terminal it cannot clear the screen. Tabs are not made spaces."""
    console = Console(
        file=io.StringIO(), force_terminal=terminal, color_system="standard" if terminal else None, width=5
    )
    write(console, [Word("a\t\x1b[2Jb\r\n c", 1)])
    assert console.file.getvalue() == expected  # type: ignore[attr-defined]


def test_long_words_are_not_wrapped_or_cut() -> None:
    console = Console(file=io.StringIO(), width=10)
    write(console, [Word("x" * 50 + " [bold]y[/] :smile:", 0)])
    assert console.file.getvalue() == "x" * 50 + " [bold]y[/] :smile:"  # type: ignore[attr-defined]


def test_the_legend_tells_shares_of_those_who_spoke() -> None:
    names = ["general", "french", "maths"]
    assert legend(names).plain == "general  french  maths"
    assert legend(names, Counter({2: 3, 0: 1})).plain == "general 25 %  maths 75 %"
    assert len({span.style for span in legend(names).spans}) == 3


def test_visible() -> None:
    assert visible("a\x00\x07\x9b\x7f\r\n\té€😀") == "a\ufffd\ufffd\ufffd\ufffd\n\té€😀"


def test_words_are_not_broken_at_the_edge() -> None:
    """At a terminal a word without room begins a line; the text is the same but for that, and a pipe gets it as it is."""
    said = [Word(f" {'x' * n}", None) for n in (5, 9, 3, 12, 1, 30, 2)] + [
        Word("\nend", None),
        Word(" more", None),
    ]
    for before in ("", "a prompt of"):
        page = Console(file=io.StringIO(), width=20, force_terminal=True, color_system=None)
        flow = Flow(page, before)
        for word in said:
            flow.write([word])
        shown = before + page.file.getvalue()  # type: ignore[attr-defined]
        assert shown.split() == (before + "".join(word.text for word in said)).split()
        assert all(len(line) <= 20 or "x" * 30 in line for line in shown.split("\n"))
    pipe = Console(file=io.StringIO(), width=20)
    Flow(pipe).write(said)
    assert pipe.file.getvalue() == "".join(word.text for word in said)  # type: ignore[attr-defined]
