"""The conversation: what is sent, what stays, what fits, and who is said to speak."""

# ruff: noqa: F401, F811 (fixtures are imported)
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_chat import CONTEXT, NAMES, llm, make_mixture, mixture, untaught

from octad.chat.session import Session, Turn
from octad.engine.llm import LLM
from octad.engine.outputs import Delta
from octad.engine.params import SamplingParams
from octad.errors import CheckpointError, DataError, OctadError, OutputError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def say(deltas: Iterator[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_the_whole_conversation_is_sent_as_the_template_says(llm: LLM, mixture: Path) -> None:
    """Each answer is what transformers generates after the text that the template makes, written here by hand."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    session = Session(llm, GREEDY, system="Be brief.")
    text = "<system>Be brief.\n"
    for question in ("Hi", "And <|end|> you?"):  # a control token's spelling is plain text
        text += f"<user>{question}\n<assistant>"
        ids = torch.tensor([llm.tokenizer.encode(text, parse_special=False)])
        out = theirs.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        expected = llm.tokenizer.decode(out.tolist())
        assert say(session.ask(question)) == expected
        assert session.turns[-1] == Turn(question, expected)
        text += expected + "\n"
    assert session.last is not None
    assert session.last.prompt_tokens == ids.shape[1]
    assert session.last.cached_tokens >= 16  # the first block at least was there already
    assert session.last.tokens == 6


def test_speakers_are_those_of_the_engines_trace(llm: LLM) -> None:
    session = Session(llm, SamplingParams(temperature=0, max_tokens=20))
    speakers = [s for delta in session.ask("Who speaks?") for s in delta.speakers or ()]
    prompt = llm.tokenizer.encode_chat([{"role": "user", "content": "Who speaks?"}])
    traced = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=20, routed_experts=True))[0]
    assert speakers == traced.outputs[0].speakers
    assert len(set(speakers)) > 1
    assert session.last is not None
    assert session.last.speakers.total() == len(speakers) == 20
    (_, count), *_ = session.last.speakers.most_common(1)
    assert f"{100 * count / 20:.0f} %" in session.last.summary(NAMES)


def test_only_one_speaks(llm: LLM) -> None:
    session = Session(llm, SamplingParams(temperature=0, max_tokens=12))
    free = say(session.ask("Hi"))
    session.reset()
    session.only("french")
    assert {s for delta in session.ask("Hi") for s in delta.speakers or ()} == {1}
    with pytest.raises(RequestError, match="did you mean french"):
        session.only("frnch")
    assert session.speaker == "french"
    session.only(None)
    session.reset()
    assert say(session.ask("Hi")) == free


def test_a_stopped_answer_stays(llm: LLM) -> None:
    session = Session(llm, SamplingParams(temperature=0, max_tokens=40, logit_bias={65: 100.0}))
    deltas = session.ask("Hi")
    said = next(deltas).text + next(deltas).text
    deltas.close()
    assert said == "bb"
    assert session.turns == [Turn("Hi", "bb")]
    assert not llm.engine.has_unfinished()
    assert session.last is not None
    assert session.last.summary(NAMES).endswith("stopped")


def test_an_interruption_in_the_middle_of_a_step_does_no_harm(
    llm: LLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(llm, SamplingParams(temperature=0, max_tokens=12))
    expected = say(session.ask("A question that is longer than a block"))
    session.reset()
    run = llm.engine.runner.run

    def interrupted(*arguments: Any) -> Any:
        run(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(session.ask("A question that is longer than a block"))
    assert session.turns == []  # nothing was said
    monkeypatch.setattr(llm.engine.runner, "run", run)
    assert say(session.ask("A question that is longer than a block")) == expected


def test_undo_and_retry(llm: LLM) -> None:
    session = Session(llm, SamplingParams(temperature=1.5, max_tokens=12, seed=5))
    with pytest.raises(RequestError, match="yet"):
        session.retry()
    with pytest.raises(RequestError, match="yet"):
        session.undo()
    first = say(session.ask("Hi"))
    second = say(session.ask("Hi"))
    other = say(session.retry())
    assert len({first, second, other}) == 3  # a seed of its own for each turn and try
    assert session.turns == [Turn("Hi", first), Turn("Hi", other)]
    assert session.undo() == Turn("Hi", other)
    assert say(session.ask("Hi")) == second  # the same seed in the same place
    session.retry().close()  # nothing said: what was there stays
    assert session.turns[1] == Turn("Hi", second)


def test_a_full_context_forgets_the_oldest_turns(llm: LLM) -> None:
    """Never more than fits, never an error, always the system text and the question."""
    session = Session(llm, SamplingParams(temperature=0, max_tokens=16), system="Keep this.")
    sent: list[str] = []
    stream = llm.stream

    def watched(prompt: Any, params: Any) -> Any:
        assert len(prompt) + params.max_tokens <= CONTEXT
        sent.append(llm.tokenizer.decode(prompt))
        return stream(prompt, params)

    llm.stream = watched  # type: ignore[method-assign]
    notices = []
    for number in range(24):
        deltas = session.ask(f"Question {number:02}")
        assert session.last is not None
        notices.append(session.last.notice)
        say(deltas)
    assert all(text.startswith("<system>Keep this.\n<user>") for text in sent)
    assert all(f"Question {number:02}\n<assistant>" in text for number, text in enumerate(sent))
    assert "Question 00" not in sent[-1]
    assert 1 <= sum(map(bool, notices)) <= 12  # not before every answer
    assert "turns do not fit" in next(filter(None, notices))
    assert len(session.turns) == 24  # what is kept and saved


def test_a_message_longer_than_the_context(llm: LLM) -> None:
    session = Session(llm, GREEDY)
    say(session.ask("Hi"))
    with pytest.raises(RequestError, match=rf"takes \d+ tokens .* context is {CONTEXT}"):
        session.ask("x" * CONTEXT)
    assert len(session.turns) == 1
    assert session.forgotten == 0
    assert say(session.ask("Still here?"))
    assert say(session.ask("x" * (CONTEXT - 30)))  # no room for the history, some for an answer


@pytest.mark.parametrize("question", ["", " \n", "\udce9t\udce9"])
def test_no_message_at_all(question: str, llm: LLM) -> None:
    with pytest.raises(DataError, match=r"empty|UTF-8"):
        Session(llm, GREEDY).ask(question)


def test_a_model_without_a_template(untaught: Path) -> None:
    with pytest.raises(CheckpointError, match="octad generate plain"):
        Session(LLM(untaught, device="cpu"), GREEDY, label="plain")


def test_save_and_load(llm: LLM, tmp_path: Path) -> None:
    session = Session(llm, GREEDY, system="Sé breve.")
    say(session.ask("¿Qué tal?"))
    path = tmp_path / "talk.json"
    session.save(path)
    session.save(path)  # one of ours may be replaced
    saved = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[1]["content"] == "¿Qué tal?"
    other = Session(llm, GREEDY)
    other.load(path)
    assert (other.system, other.turns) == (session.system, session.turns)
    assert say(other.ask("More")) == say(session.ask("More"))
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(saved[1:]))
    other.load(bare)
    assert (other.system, len(other.turns)) == (None, 1)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["bare.json", "talk.json"]


def test_save_does_not_destroy(llm: LLM, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    session = Session(llm, GREEDY)
    for path in (thesis, tmp_path, tmp_path / "missing" / "talk.json"):
        with pytest.raises(OutputError, match=str(path)):
            session.save(path)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("not json", "not JSON"),
        ("{}", "'messages'"),
        ('{"messages": [1]}', "message 1: expected an object"),
        ('[{"role": "assistant", "content": "x"}]', "message 1: expected the role 'user', found 'assistant'"),
        ('[{"role": "user", "content": "x"}]', "no answer"),
        ('[{"role": "user", "content": null}]', "message 1: expected an object"),
        ('[{"role": "user", "content": "\\ud800"}]', "UTF-8"),
        ('[{"role": "system", "content": "x"}, {"role": "system", "content": "x"}]', "message 2"),
    ],
)
def test_files_that_are_no_conversation(content: str | None, reason: str, llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    if content is not None:
        path.write_text(content)
    session = Session(llm, GREEDY, system="S")
    session.turns = [Turn("a", "b")]
    with pytest.raises(OctadError, match=reason) as caught:
        session.load(path)
    assert str(path) in str(caught.value)
    assert (session.system, session.turns) == ("S", [Turn("a", "b")])
