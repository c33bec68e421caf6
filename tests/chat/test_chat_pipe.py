"""chat and generate without a terminal: the bare text on stdout, everything else on stderr, and the exit codes."""

# ruff: noqa: F401, F811 (fixtures are imported)
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from tiny_chat import NAMES, llm, mixture, untaught

from octad.chat import pipe
from octad.chat.pipe import messages
from octad.cli import answering
from octad.cli.main import main as cli
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import RequestError
from octad.report import terminal

Outcome = tuple[int, str, str]
Octad = Callable[..., Outcome]


@pytest.fixture
def octad(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Octad:
    """octad("generate", path, ..., stdin="text") -> (exit code, stdout, stderr), through main()."""
    torch.set_num_threads(1)

    def run(*arguments: object, stdin: str | bytes = "") -> Outcome:
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["octad", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def refused(outcome: Outcome, *parts: str) -> None:
    code, _, err = outcome
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("octad: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in err


def greedy(mixture: Path, llm: LLM, text: str, tokens: int) -> tuple[list[int], str]:
    """What transformers says after a text, in the precision of the command line."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    ids = torch.tensor([llm.tokenizer.encode(text)])
    out = theirs.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return out.tolist(), llm.tokenizer.decode(out.tolist())


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes what the hardware is fast at; here it is what can be compared token for token."""
    monkeypatch.setattr("octad.engine.opened.compute_dtype", lambda device="cpu": torch.float32)


# ---- chat ------------------------------------------------------------------------------------------------------


def test_each_line_is_a_turn(octad: Octad, mixture: Path, llm: LLM) -> None:
    options = ("--temperature", 0, "--max-tokens", 6)
    code, out, err = octad("chat", mixture, *options, stdin="Hi\n\nAnd you?\n")
    _, first = greedy(mixture, llm, "<user>Hi\n<assistant>", 6)
    _, second = greedy(mixture, llm, f"<user>Hi\n<assistant>{first}\n<user>And you?\n<assistant>", 6)
    assert (code, out, err) == (0, f"{first}\n{second}\n", "")


def test_commands_and_notices_stay_off_stdout(octad: Octad, mixture: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    lines = f"/set temperature 0\n/system Be brief.\none\\\ntwo\n/save {talk}\n/retry\n/quit\nnever asked\n"
    code, out, err = octad("chat", mixture, "--max-tokens", 5, stdin=lines)
    assert code == 0
    saved = [m["content"] for m in json.loads(talk.read_text())["messages"]]
    assert saved[:2] == ["Be brief.", "one\ntwo"]
    assert out == f"{saved[2]}\n" * 2  # the retry at temperature 0 says the same
    assert "temperature 0\n" in err
    assert "saved 1 turn" in err
    again = octad("chat", mixture, "--max-tokens", 5, "--load", talk, "--temperature", 0, stdin="/retry\n")
    assert again[:2] == (0, f"{saved[2]}\n")


def test_a_long_conversation_in_a_pipe(octad: Octad, mixture: Path) -> None:
    lines = "".join(f"Question number {number}\n" for number in range(12))
    code, out, err = octad("chat", mixture, "--max-tokens", 8, "--seed", 1, stdin=lines)
    assert code == 0
    assert "not fit the context any more" in err
    assert len(out) >= 12


def test_mistakes_in_chat(octad: Octad, mixture: Path, untaught: Path, tmp_path: Path) -> None:
    refused(octad("chat", untaught, stdin="Hi\n"), "no chat template", f"octad generate {untaught}")
    refused(octad("chat", mixture, stdin="/exprets\n"), "did you mean /experts?")
    refused(octad("chat", mixture, stdin="x" * 500 + "\n"), "context is 384")
    refused(octad("chat", mixture, stdin=b"caf\xe9\n"), "UTF-8")
    refused(octad("chat", mixture, "--load", tmp_path / "none.json"), "none.json")
    refused(octad("chat", mixture, "--only", "frnch"), "did you mean french?")
    refused(octad("chat", mixture, "--top-p", 7), "top_p")
    refused(octad("chat", mixture, "--quantize", "int3"), "int3")
    refused(octad("chat", tmp_path / "nowhere"), "nowhere")
    assert octad("chat", mixture) == (0, "", "")  # nothing asked


def test_a_terminal_needs_prompt_toolkit(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is read; a pipe does without."""
    monkeypatch.setattr(pipe, "is_terminal", lambda: True)
    monkeypatch.setattr(terminal, "out", Console(force_terminal=True))
    monkeypatch.setattr(answering, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"prompt_toolkit: pip install 'octad\[chat\]'"):
        answering.chat(str(mixture / "nowhere"))


def test_joined_lines() -> None:
    assert list(messages(["a\n", "\n", "b\\\n", " c\\\n", "d\n", " \n", "e"])) == ["a", "b\n c\nd", "e"]
    assert list(messages(["unfinished\\\n"])) == ["unfinished"]


# ---- generate --------------------------------------------------------------------------------------------------


def test_the_bare_answer(octad: Octad, mixture: Path, llm: LLM) -> None:
    tokens, text = greedy(mixture, llm, "Once", 12)
    assert octad("generate", mixture, "Once", "--max-tokens", 12) == (0, f"{text}\n", "")
    for prompt in ((), ("-",)):
        assert octad("generate", mixture, *prompt, "--max-tokens", 12, stdin="Once\n") == (0, f"{text}\n", "")
    found = json.loads(octad("generate", mixture, "Once", "--max-tokens", 12, "--json")[1])
    assert (found["tokens"], found["text"], found["finish_reason"]) == (tokens, text, "length")
    assert found["prompt_tokens"] == llm.tokenizer.encode("Once")
    assert set(found["speakers"]) <= set(NAMES)
    assert len(found["speakers"]) == 12


def test_through_the_template(octad: Octad, mixture: Path, llm: LLM) -> None:
    _, text = greedy(mixture, llm, "<user>Once\n<assistant>", 8)
    assert octad("generate", mixture, "Once", "--chat", "--max-tokens", 8)[1] == f"{text}\n"


def test_logprobs_are_those_of_transformers(octad: Octad, mixture: Path, llm: LLM) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = theirs(torch.tensor([llm.tokenizer.encode("Once")])).logits[0, -1].log_softmax(-1)
    arguments = ("generate", mixture, "Once", "--max-tokens", 3, "--logprobs", 2)
    first = json.loads(octad(*arguments, "--json")[1])["logprobs"][0]
    assert first["logprob"] == pytest.approx(float(expected.max()), abs=1e-4)
    assert [t["logprob"] for t in first["top"]] == pytest.approx(expected.topk(2).values.tolist(), abs=1e-4)
    _, out, _ = octad(*arguments)
    assert f"{expected.max():.3f}" in out


def test_routes(octad: Octad, mixture: Path) -> None:
    arguments = ("generate", mixture, "Once", "--max-tokens", 5, "--routes")
    found = json.loads(octad(*arguments, "--json")[1])
    assert torch.tensor(found["routed_experts"]).shape == (5, 2, 2)
    assert torch.tensor(found["routed_weights"]).sum(-1) == pytest.approx(torch.ones(5, 2), abs=1e-3)
    lines = octad(*arguments)[1].splitlines()[-7:]
    assert lines[0].split() == ["token", "speaker", *NAMES]
    for line, speaker in zip(lines[1:6], found["speakers"], strict=True):
        shares = [0 if cell == "·" else int(cell) for cell in line.split()[-3:]]
        assert speaker in line
        assert shares[NAMES.index(speaker)] == max(shares)
        assert abs(sum(shares) - 100) <= 2


def test_one_expert_only(octad: Octad, mixture: Path) -> None:
    options = ("--max-tokens", 6, "--json", "--only", "maths")
    assert json.loads(octad("generate", mixture, "Once", *options)[1])["speakers"] == ["maths"] * 6


def test_several_answers_and_stops(octad: Octad, mixture: Path) -> None:
    several = ("generate", mixture, "Once", "--n", 3, "--temperature", 1, "--seed", 4, "--max-tokens", 6)
    found = json.loads(octad(*several, "--json")[1])["answers"]
    texts = [answer["text"] for answer in found]
    assert len(set(texts)) == 3
    assert octad(*several)[1] == "\n\n".join(texts) + "\n"
    whole = octad("generate", mixture, "Once", "--max-tokens", 30)[1]
    stop = whole[4:6]
    cut = json.loads(octad("generate", mixture, "Once", "--max-tokens", 30, "--stop", stop, "--json")[1])
    assert (cut["text"], cut["stop_reason"]) == (whole[: whole.index(stop)], stop)


def test_forms(octad: Octad, mixture: Path, tmp_path: Path) -> None:
    assert octad("generate", mixture, "Once", "--regex", "(yes|no)!")[1] in ("yes!\n", "no!\n")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": [{"a": 1}, {"a": 2}]}))
    _, out, _ = octad("generate", mixture, "Once", "--schema", schema, "--max-tokens", 200)
    assert json.loads(out)["a"] in (1, 2)
    grammar = tmp_path / "sum.lark"
    grammar.write_text('start: digit "+" digit\ndigit: "1" | "2"\n')
    assert re.fullmatch(r"[12]\+[12]\n", octad("generate", mixture, "Once", "--grammar", grammar)[1])


def test_mistakes_in_generate(octad: Octad, mixture: Path, untaught: Path, tmp_path: Path) -> None:
    for prompt, stdin in (("", ""), (" \n", ""), ("-", ""), ("-", "\n")):
        refused(octad("generate", mixture, prompt, stdin=stdin), "prompt is empty")
    refused(octad("generate", mixture, "-", stdin=b"\xff"), "UTF-8")
    refused(octad("generate", mixture, "\udce9t\udce9"), "UTF-8")
    refused(octad("generate", mixture, "x" * 400), "400 tokens", "384")
    refused(octad("generate", mixture, "x", "--only", "Maths"), "Maths: no such expert; did you mean maths?")
    refused(octad("generate", untaught, "x", "--only", "maths"), "dense")
    refused(octad("generate", untaught, "x", "--routes"), "dense")
    refused(octad("generate", untaught, "x", "--chat"), "no chat template")
    refused(octad("generate", mixture, "x", "--temperature", -1), "temperature")
    refused(octad("generate", mixture, "x", "--min-p", 2), "min_p")
    refused(octad("generate", mixture, "x", "--n", 2), "n: found 2")  # greedy: both would be the same
    refused(octad("generate", mixture, "x", "--n", 0), "n: found 0")
    refused(octad("generate", mixture, "x", "--stop", ""), "stop")
    refused(octad("generate", mixture, "x", "--logprobs", -1), "logprobs")
    refused(octad("generate", mixture, "x", "--regex", "("), "regex")
    refused(
        octad("generate", mixture, "x", "--schema", tmp_path / "none.json"), "none.json", "cannot be read"
    )
    refused(
        octad("generate", mixture, "x", "--schema", mixture / "tokenizer.json", "--regex", "x"), "exclude"
    )
    refused(
        octad("generate", mixture, "x", "--grammar", mixture / "none.lark"), "none.lark", "cannot be read"
    )
    refused(octad("generate", mixture, "x", "--grammar", mixture / "config.json"), "structured.grammar")
    refused(octad("generate", mixture, "x", "--grammar", mixture / "config.json", "--regex", "x"), "exclude")
    (tmp_path / "bad.json").write_text("{")
    refused(octad("generate", mixture, "x", "--schema", tmp_path / "bad.json"), "JSON schema")
    refused(octad("generate", mixture, "x", "--quantize", "int3"), "int3")


def test_an_encoding_that_is_small(octad: Octad, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert octad("generate", mixture, "Once", "--max-tokens", 50)[0] == 0
    assert b"?" in raw.getvalue()


def test_a_reader_that_leaves(mixture: Path) -> None:
    """`| head -c 1` is no crash."""
    command = [sys.executable, "-m", "octad.cli", "generate", str(mixture), "Once", "--max-tokens", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        reader.stdout.read(1)
        reader.stdout.close()
        assert reader.stderr.read() == b""
        assert reader.wait(100) == 1
