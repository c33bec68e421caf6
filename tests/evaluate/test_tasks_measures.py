"""The measures against transformers and against models whose answers are known."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from judging import World, theirs
from members import make_base
from peft import PeftModel

from octad.engine.llm import LLM
from octad.engine.loop import Stream
from octad.engine.params import SamplingParams
from octad.errors import DataError, RequestError, SandboxError
from octad.evaluate.tasks import humaneval, writing
from octad.evaluate.tasks.answers import _share, is_right, normalise, write
from octad.evaluate.tasks.choice import measure_choice
from octad.evaluate.tasks.entrants import lineup
from octad.evaluate.tasks.humaneval import measure_code
from octad.evaluate.tasks.likelihood import begin_ids, encode_pair, log_likelihoods
from octad.evaluate.tasks.run_tasks import run_tasks
from octad.evaluate.tasks.task import (
    ChoiceTask,
    CodeTask,
    ContinuationTask,
    GenerateTask,
    Passage,
    Problem,
    Prompt,
    Question,
)
from octad.evaluate.tasks.work import Work
from octad.evaluate.tasks.writing import Cut, choose_candidates, cut_passages, diversity, measure_continuation
from octad.sandbox.run import Outcome, Sandbox

WORDS = (
    "the old man went down to the river and " * 8 + "a cat sat there. ",
    "one two three four five six. " * 12,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("tasks") / "base", "llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def llm(base: Path) -> LLM:
    return LLM(base, dtype="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), "llama")


@torch.no_grad()
def their_likelihood(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """By log_softmax over the whole text, one pair at a time."""
    ids = torch.tensor([[*context, *continuation]])
    logp = F.log_softmax(model(ids).logits[0, :-1].double(), -1)[-len(continuation) :]
    wanted = torch.tensor(continuation)
    return float(-logp.gather(1, wanted[:, None]).sum()), bool((logp.argmax(-1) == wanted).all())


def test_likelihoods_are_transformers(base: Path, llm: LLM) -> None:
    model = theirs(base)
    texts = [
        ("ab", " cd"),
        ("", "xyz"),
        ("a longer context, by far", "!"),
        ("ends with blanks  ", "so"),
        ("q", "w" * 90),
    ]
    pairs = [encode_pair(llm.tokenizer, *text) for text in texts]
    greedy = model.generate(torch.tensor([pairs[0][0]]), max_new_tokens=4, do_sample=False)[0].tolist()
    pairs.append((pairs[0][0], greedy[len(pairs[0][0]) :]))
    told: list[float] = []
    found = log_likelihoods(llm.model, pairs, tokens_per_batch=60, progress=told.append)
    for pair, mine in zip(pairs, found, strict=True):
        nats, first = their_likelihood(model, *pair)
        assert mine.nats == pytest.approx(nats, rel=1e-5)
        assert mine.greedy is first
    assert found[-1].greedy
    assert told[-1] == 1.0


def test_a_text_longer_than_the_context_loses_its_beginning(base: Path, llm: LLM) -> None:
    ids = [(7 * i) % 200 for i in range(600)]
    (mine,) = log_likelihoods(llm.model, [(ids[:590], ids[590:])])
    nats, _ = their_likelihood(theirs(base), ids[-513:-10], ids[590:])
    assert mine.nats == pytest.approx(nats, rel=1e-5)


def test_pairs_are_cut_as_lm_eval_does(llm: LLM) -> None:
    tokenizer = llm.tokenizer
    assert encode_pair(tokenizer, "ab ", "c") == encode_pair(tokenizer, "ab", " c")
    context, continuation = encode_pair(tokenizer, "ab", " c")
    assert tokenizer.decode([*context]) == "ab"
    assert tokenizer.decode([*continuation]) == " c"
    assert encode_pair(tokenizer, "", "c")[0] == begin_ids(tokenizer) == [256]  # no bos here: the end token


def test_choice_takes_the_likeliest(base: Path, llm: LLM) -> None:
    model = theirs(base)
    questions = [
        Question(question=f"question {n}", choices=("yes", "no, never", "x" * (n + 1)), answer=n % 3)
        for n in range(12)
    ]
    acc, norm = measure_choice(llm, ChoiceTask(name="t", examples=tuple(questions)))
    for number, question in enumerate(questions):
        nats = [
            their_likelihood(model, *encode_pair(llm.tokenizer, question.question, " " + choice))[0]
            for choice in question.choices
        ]
        even = [n / len(c) for n, c in zip(nats, question.choices, strict=True)]
        assert acc.values[number] == (min(nats) == nats[question.answer])
        assert norm.values[number] == (min(even) == even[question.answer])
    assert acc.chance == pytest.approx(1 / 3)
    assert len({*acc.values}) == 2  # the test would see a constant


def test_write_is_the_engines_answer_in_order(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [f"prompt {n}" for n in range(9)]
    alone = [llm.generate(prompt, params)[0].outputs[0].text for prompt in prompts]
    told: list[float] = []
    assert write(llm, prompts, params, told.append) == [[text] for text in alone]
    assert told[-1] == 1.0
    assert not llm.engine.requests


def test_how_far_all_are_is_told_by_tokens(llm: LLM) -> None:
    """They run side by side: one that has ended says nothing of how far the others are."""
    short = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    long = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with closing(llm.submit("one", short)) as ended:
        text = ended.output().outputs[0].text
        with closing(llm.submit("one", replace(short, stop=(text[2:4],)))) as stopped:
            said = len(stopped.output().outputs[0].token_ids)
            going_on = Stream(llm.loop, "another", 1, keep=False)
            assert 0 < said < 8
            assert _share([ended, stopped], [short, short], 8 + said) == 1.0
            assert _share([stopped, going_on], [short, long], said + 12) == 20 / 32


def test_write_shortens_what_does_not_fit_and_forgets_what_it_began(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    assert write(llm, ["a" * 2000], params) == write(llm, ["a" * 507], params)
    with pytest.raises(RequestError):
        write(llm, ["good", ""], params)
    assert not llm.engine.requests


def test_seeds_repeat_and_no_two_prompts_share_them(llm: LLM) -> None:
    params = SamplingParams(temperature=1, n=2, seed=5, max_tokens=8, ignore_eos=True)
    first = write(llm, ["same", "same"], params)
    assert first == write(llm, ["same", "same"], params)
    assert len({text for texts in first for text in texts}) == 4


@pytest.mark.parametrize(
    ("text", "answers", "match", "right"),
    [
        (" Paris.", ("Paris",), "exact", True),
        (" PARIS  ", ("paris",), "exact", True),
        (" Paris, France", ("Paris",), "exact", False),
        (" Paris, France", ("Paris",), "contains", True),
        (" Parisian", ("Paris",), "contains", False),
        (" 15", ("5",), "contains", False),
        (" it is -5", ("-5",), "contains", True),
        ("ﬁne", ("fine",), "exact", True),
        (" no", ("yes", "No"), "exact", True),
        ("", ("x",), "contains", False),
    ],
)
def test_what_counts_as_right(text: str, answers: tuple[str, ...], match: str, right: bool) -> None:
    assert is_right(text, Prompt(prompt="p", answers=answers), match) is right


def test_regex_and_normalisation() -> None:
    assert is_right("about 42 of them", Prompt(prompt="p", regex=r"\b42\b"), "exact")
    assert not is_right("about 420 of them", Prompt(prompt="p", regex=r"\b42\b"), "exact")
    assert normalise('  "Two   WORDS."\n') == "two words"


def written(monkeypatch: pytest.MonkeyPatch, room: Any, answer: Callable[[int, str], list[str]]) -> list[Any]:
    """Put known texts in the place of the model's; returns what it was asked with."""
    asked: list[Any] = []

    def fake(llm: Any, prompts: Sequence[str], params: Any, progress: Any = None) -> list[list[str]]:
        asked.append((prompts, params))
        return [answer(n, prompt) for n, prompt in enumerate(prompts)]

    monkeypatch.setattr(room, "write", fake)
    return asked


class Everything:
    """A sandbox that passes programs with 'good' in them."""

    def run_all(self, programs: Sequence[str], progress: Callable[[int], None]) -> list[Outcome]:
        progress(len(programs))
        return [Outcome("good" in program) for program in programs]


def test_pass_at_k_counts_each_problems_samples(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    problem = {"prompt": "def f():\n    '''Doc'''\n\n", "test": "def check(f): pass", "entry_point": "f"}
    problems = tuple(Problem(task_id=f"t/{n}", **problem) for n in range(3))
    asked = written(monkeypatch, humaneval, lambda n, prompt: ["\n    good"] * n + ["\n    bad"] * (4 - n))
    task = CodeTask(name="t", examples=problems, samples=4)
    told: list[float] = []
    one, four = measure_code(llm, task, Work(told.append, Everything))  # type: ignore[arg-type]
    assert (one.metric, one.values) == ("pass@1", [0, 0.25, 0.5])
    assert (four.metric, four.values) == ("pass@4", [0, 1, 1])
    ((prompts, params),) = asked
    assert prompts[0] == "def f():\n    '''Doc'''"  # the line break is the model's to write
    assert (params.n, params.temperature, params.stop[0]) == (4, 0.8, "\nclass")
    assert told[-1] == 1.0
    asked = written(monkeypatch, humaneval, lambda n, prompt: ["\n    good"])
    assert [
        m.metric
        for m in measure_code(llm, task.model_copy(update={"samples": 1}), Work(make_sandbox=Everything))
    ] == ["pass@1"]  # type: ignore[arg-type]
    assert asked[0][1].greedy


def passages(count: int, group: str = "") -> tuple[Passage, ...]:
    """Documents of different words, so that a continuation fits its own beginning alone."""
    return tuple(
        Passage(text=" ".join(f"{chr(97 + n)}{i}" for i in range(90)), group=group) for n in range(count)
    )


def test_passages_are_cut_at_blanks() -> None:
    task = ContinuationTask(name="t", examples=passages(3), given=100, length=40, written=80, distractors=2)
    for cut, passage in zip(cut_passages(task), task.examples, strict=True):
        assert passage.text.startswith(cut.given + cut.human)
        assert cut.human.startswith(cut.true)
        assert cut.true.startswith(" ")
        assert not cut.given.endswith(" ")
        assert 90 < len(cut.given) <= 100
        assert 30 < len(cut.true) <= 40


def test_candidates_are_the_own_one_and_others_of_the_group() -> None:
    cuts = [Cut("g", f"t{n}", "h", group) for group in ("a", "b") for n in range(5)]
    task = ContinuationTask(name="t", examples=passages(2), distractors=3)
    chosen = choose_candidates(cuts, task)
    assert chosen == choose_candidates(cuts, task)
    for number, (own, *others) in enumerate(chosen):
        assert own == number
        assert len({own, *others}) == 4
        assert {cuts[c].group for c in others} == {cuts[number].group}
    with pytest.raises(
        DataError, match="group 'a' has 5 passages that are long enough, and distractors: 5 needs 6"
    ):
        choose_candidates(cuts, task.model_copy(update={"distractors": 5}))
    with pytest.raises(DataError, match="0 documents have 800 characters; two or more are needed"):
        cut_passages(ContinuationTask(name="t", examples=passages(3)))


def test_diversity_by_hand() -> None:
    """ "a b a b a": 2-grams ab ba ab ba, 3-grams aba bab aba, 4-grams abab baba: 2/4 · 2/3 · 2/2."""
    assert diversity("a b a b a") == pytest.approx(2 / 4 * 2 / 3)
    assert diversity("one two three four five") == 1
    assert diversity("one") == 1
    assert diversity("x " * 50) == pytest.approx(1 / 49 * 1 / 48 * 1 / 47)


def test_continuation_numbers_are_made_of_transformers(
    base: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = theirs(base)
    written(monkeypatch, writing, lambda n, prompt: ["x " * 50])
    task = ContinuationTask(name="t", examples=passages(4), given=100, length=40, written=80, distractors=3)
    bits, identified, varied = measure_continuation(llm, task)
    cuts, bytes_, nats = cut_passages(task), 0, 0.0
    for number, cut in enumerate(cuts):
        scores = []
        for other in cuts:
            given = their_likelihood(model, *encode_pair(llm.tokenizer, cut.given, other.true))[0]
            alone = their_likelihood(model, *encode_pair(llm.tokenizer, "", other.true))[0]
            scores.append(alone - given)
        assert identified.values[number] == (max(scores) == scores[number])
        nats += their_likelihood(model, *encode_pair(llm.tokenizer, cut.given, cut.true))[0]
        bytes_ += len(cut.true.encode())
    assert bits.score().value == pytest.approx(nats / math.log(2) / bytes_, rel=1e-5)
    assert identified.chance == 1 / 4
    assert max(varied.values) < 0.01


def test_the_true_continuation_is_told_by_a_model_that_copies(
    monkeypatch: pytest.MonkeyPatch, llm: LLM
) -> None:
    """A model that likes the letters it has seen, and one that likes plain letters whatever came before."""
    written(monkeypatch, writing, lambda n, prompt: [""])
    task = ContinuationTask(name="t", examples=passages(6), given=100, length=40, written=80, distractors=5)

    def copying(context: Sequence[int], continuation: Sequence[int]) -> float:
        seen = Counter(context)
        return -sum(math.log((seen[i] + 0.1) / (len(context) + 25)) for i in continuation)

    def plain(context: Sequence[int], continuation: Sequence[int]) -> float:
        return float(sum(continuation))

    for score, share in ((copying, 1.0), (plain, 0.0)):
        found = [
            lambda pairs, score=score: [type("L", (), {"nats": score(*pair)}) for pair in pairs],
        ]
        monkeypatch.setattr(writing, "log_likelihoods", lambda model, pairs, progress, f=found[0]: f(pairs))
        _, identified, _ = measure_continuation(llm, task)
        assert identified.score().value == share


def test_members_and_soup_are_the_models_themselves(world: World) -> None:
    """Each entrant's likelihoods against the model of transformers that it stands for."""
    pair = ([10, 20, 30, 40], [50, 60, 70])
    found = {
        e.name: (log_likelihoods(e.llm.model, [pair])[0].nats, e.kind)
        for e in lineup(world.mixture, members=True, dtype="float32")
    }
    assert next(iter(found)) == "mixture top-2"
    assert set(found) == {"mixture top-2", "general", "lora", "full", "far", "soup"}
    assert [found[name][1] for name in ("mixture top-2", "lora", "soup")] == ["mixture", "member", "soup"]
    for name in ("general", "full", "far"):
        assert found[name][0] == pytest.approx(
            their_likelihood(theirs(world.models[name]), *pair)[0], rel=1e-4
        )
    lora = PeftModel.from_pretrained(theirs(world.base), world.models["lora"])
    assert found["lora"][0] == pytest.approx(their_likelihood(lora, *pair)[0], rel=1e-4)
    parts = [theirs(world.models[name]).state_dict() for name in ("full", "far")]
    parts.append(lora.merge_and_unload().state_dict())
    soup = theirs(world.base)
    soup.load_state_dict({k: torch.stack([part[k] for part in parts]).mean(0) for k in parts[0]})
    assert found["soup"][0] == pytest.approx(their_likelihood(soup, *pair)[0], rel=1e-4)
    mixture = transformers.AutoModelForCausalLM.from_pretrained(world.mixture, dtype=torch.float32).eval()
    assert found["mixture top-2"][0] == pytest.approx(their_likelihood(mixture, *pair)[0], rel=1e-4)


def test_rows_are_what_the_report_takes(world: World, tmp_path: Path) -> None:
    file = tmp_path / "quiz.jsonl"
    lines = [{"question": f"q{n}", "choices": ["yes", "no"], "answer": n % 2} for n in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = tmp_path / "short.yaml"
    prompts.write_text(
        "kind: generate\nmax_tokens: 3\nexamples: [{prompt: a, answer: b}, {prompt: c, regex: '.*'}]\n"
    )
    told: dict[str, float] = {}
    rows = run_tasks(
        world.mixture,
        [str(file), str(prompts)],
        members=True,
        limit=4,
        dtype="float32",
        progress=told.__setitem__,
    )
    assert json.loads(json.dumps(rows)) == rows
    assert [(r["name"], r["kind"], r["metric"], r["examples"]) for r in rows] == [
        ("quiz", "choice", "acc", 4),
        ("quiz", "choice", "acc_norm", 4),
        ("short", "generate", "exact match", 2),
    ]
    names = {"mixture top-2", "general", "lora", "full", "far", "soup"}
    for row in rows:
        assert set(row["scores"]) == names
        assert {d["against"] for d in row["differences"]} == names - {"mixture top-2"}
        for d in row["differences"]:
            mine, other = row["scores"]["mixture top-2"], row["scores"][d["against"]]
            assert d["difference"] == pytest.approx(mine["value"] - other["value"])
            assert d["low"] <= d["difference"] <= d["high"]
        assert all(0 <= s["low"] <= s["value"] <= s["high"] <= 1 for s in row["scores"].values())
    assert told == dict.fromkeys(names, 1.0)


def test_a_member_that_is_gone_is_judged_as_the_mixture_holds_it(world: World, tmp_path: Path) -> None:
    moved = tmp_path / "mixture"
    shutil.copytree(world.mixture, moved)
    record = json.loads((moved / "octad.json").read_text())
    record["experts"][3]["path"] = str(tmp_path / "gone")
    (moved / "octad.json").write_text(json.dumps(record))
    file = tmp_path / "quiz.jsonl"
    file.write_text(json.dumps({"question": "q", "choices": ["yes", "no"], "answer": 0}) + "\n")
    acc, _ = run_tasks(moved, [str(file)], members=True, dtype="float32")
    assert list(acc["notes"]) == ["far", "soup"]
    assert "with the mixture's attention" in acc["notes"]["soup"]
    assert acc["notes"]["far"].startswith("as the mixture holds it, with its attention (")
    assert "far" in acc["scores"]


def test_human_text_stands_beside_the_samples(llm: LLM, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "prose.yaml"
    texts = "".join(f"  - {{text: {json.dumps(p.text)}}}\n" for p in passages(3))
    file.write_text(
        f"kind: continuation\ngiven: 60\nlength: 20\nwritten: 30\ndistractors: 2\nexamples:\n{texts}"
    )
    rows = {row["metric"]: row for row in run_tasks(base, [str(file)], dtype="float32")}
    assert list(rows) == ["bits_per_byte", "identified", "diversity"]
    assert list(rows["diversity"]["scores"]) == ["model", "human text"]
    assert rows["diversity"]["scores"]["human text"]["value"] == 1
    assert rows["diversity"]["differences"] == []
    assert list(rows["identified"]["scores"]) == ["model"]


def test_mistakes_come_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    file = tmp_path / "prose.jsonl"
    file.write_text('{"text": "too short"}\n' * 3)
    with pytest.raises(DataError, match="0 documents have 800 characters"):
        run_tasks(tmp_path / "no-model", [str(file)])
    with pytest.raises(RequestError, match="is dense, it has no members; leave out --members"):
        run_tasks(base, ["octad-choice"], members=True, limit=2)

    def refuse(**options: Any) -> Sandbox:
        raise SandboxError("this kernel cannot confine programs")

    monkeypatch.setattr("octad.evaluate.tasks.run_tasks.Sandbox", refuse)
    with pytest.raises(SandboxError):
        run_tasks(tmp_path / "no-model", ["octad-code"])


def test_short_answers_are_judged(llm: LLM) -> None:
    from octad.evaluate.tasks.answers import measure_answers

    params = SamplingParams(temperature=0, max_tokens=4, stop=("\n",))
    said = write(llm, ["one", "two"], params)
    examples = (Prompt(prompt="one", regex=r"(?s).*"), Prompt(prompt="two", answers=("never said by it",)))
    (measured,) = measure_answers(llm, GenerateTask(name="t", examples=examples, max_tokens=4))
    assert (measured.metric, measured.values) == ("exact match", [1, 0])
    assert len(said) == 2
