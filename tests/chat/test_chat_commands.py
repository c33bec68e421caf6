"""Lines with a slash: what they change, and what is said about a wrong one."""

# ruff: noqa: F401, F811 (fixtures are imported)
from pathlib import Path

import pytest
from tiny_chat import NAMES, llm, mixture, untaught

from octad.chat.session import Session, Turn
from octad.chat.slash import COMMANDS, SETTINGS, as_message, is_command, run
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import OctadError


@pytest.fixture
def session(llm: LLM) -> Session:
    return Session(llm, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8))


def test_help_names_every_command_and_what_experts_does_to_markdown(session: Session) -> None:
    text = run(session, "/help").text
    assert all(f"\n{name} " in f"\n{text}" for name in COMMANDS)
    assert "/experts on as plain text" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_settings_are_shown_changed_and_checked(session: Session) -> None:
    shown = run(session, "/set").text
    assert [line.split()[0] for line in shown.splitlines()] == list(SETTINGS)
    assert "top_p               0.9" in shown
    assert run(session, "/set temperature 0.25").text == "temperature 0.25"
    assert run(session, "/set top-k=4").text == "top_k 4"
    assert run(session, "/set seed 3").text == "seed 3"
    assert run(session, "/set seed none").text == "seed none"
    assert run(session, "/set top_p").text == "top_p 0.9"
    assert session.params == SamplingParams(temperature=0.25, top_p=0.9, top_k=4, max_tokens=8)


def test_the_rest(session: Session, tmp_path: Path) -> None:
    session.turns = [Turn("a", "b"), Turn("long " * 30, "d")]
    assert run(session, "/system").text == "system text: none"
    assert run(session, "/system Be kind.").text == "system text: Be kind."
    for quote in ("", '"', "'"):
        said = run(session, f"/save {quote}{tmp_path / 'a b.json'}{quote}").text
        assert said == f"saved 2 turns in {tmp_path / 'a b.json'}"
    assert len(run(session, "/undo").text) <= 72
    assert run(session, "/system off").text == "system text: none"
    assert run(session, "/reset").text == "a new conversation"
    assert run(session, f"/load {tmp_path / 'a b.json'}").text.startswith("loaded 2 turns")
    assert session.system == "Be kind."
    assert run(session, "/experts on").then == "legend"
    assert session.show_speakers
    assert run(session, "/experts off").text == "answers as Markdown"
    assert not session.show_speakers
    assert run(session, "/only french").text == "only french answers"
    assert run(session, "/only").text == "only french answers"
    assert run(session, "/only off").text == "the routers choose the experts"
    assert run(session, "/retry").then == "retry"
    assert run(session, "/quit").then == "quit"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/exprets", "/exprets: no such command; did you mean /experts?"),
        ("/", "there are /help, /reset"),
        ("/HELP", "did you mean /help?"),
        ("/quit now", "takes nothing after it, found 'now'"),
        ("/set temprature 1", "did you mean temperature?"),
        ("/set temperature hot", "expected a number, found 'hot'"),
        ("/set top_k 1.5", "expected a whole number, found '1.5'"),
        ("/set temperature -1", "temperature: found -1.0"),
        ("/set top_p 2", "top_p: found 2.0"),
        ("/set max_tokens 0", "max_tokens: found 0"),
        ("/set temperature nan", "temperature: found nan"),
        ("/save", "/save needs a file name"),
        ("/load", "/load needs a file name"),
        ("/load /no/such/file", "cannot be read"),
        ("/load ~nobody-of-this-name/x", "no such user"),
        ("/experts maybe", "expected on or off"),
        ("/only frnch", "did you mean french?"),
        ("/undo", "no turn"),
    ],
)
def test_mistakes_change_nothing(line: str, reason: str, session: Session) -> None:
    before = session.params
    with pytest.raises(OctadError) as caught:
        run(session, line)
    assert reason in str(caught.value)
    assert session.params == before
    assert session.speaker is None


def test_dense_models_have_no_experts(untaught: Path, llm: LLM) -> None:
    dense = LLM(untaught, device="cpu")
    dense.tokenizer.config["chat_template"] = llm.tokenizer.chat_template
    session = Session(dense, SamplingParams(max_tokens=4))
    for line in ("/experts on", "/only french"):
        with pytest.raises(OctadError, match="dense"):
            run(session, line)
    assert [delta.speakers for delta in session.ask("Hi")] == [None] * 4


def test_what_is_a_command() -> None:
    assert is_command("/help")
    assert not is_command("//etc is a directory")
    assert as_message("//etc is a directory") == "/etc is a directory"
    assert as_message("a/b") == "a/b"
