"""Answers of a given form, from logits that know nothing of it: whatever is drawn must parse, match and fit."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, finish, load, make_engine
from tiny_models import TinyCheckpoint
from vocabularies import sentencepiece, smollm2

from octad.engine.detokenize import Detokenizer
from octad.engine.params import SamplingParams, StructuredOutput
from octad.engine.sampling import Sampler, SamplingState
from octad.engine.structured import KEPT_GRAMMARS, GrammarCompiler
from octad.errors import RequestError
from octad.text.tokenizer import Tokenizer

MAKERS = {"bytes": smollm2, "sentencepiece": sentencepiece}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "é"]}, "minItems": 1, "maxItems": 3},
        "married": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags", "married"],
    "additionalProperties": False,
}
POINT = {
    "$defs": {"x": {"type": "number"}},
    "type": "array",
    "items": {"$ref": "#/$defs/x"},
    "minItems": 2,
    "maxItems": 2,
}


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "age", "tags", "married"]
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 3
        and set(value["tags"]) <= {"a", "b c", "é"}
        and value["married"] in (True, False, None)
    )


def is_point(value: Any) -> bool:
    return len(value) == 2 and all(type(x) in (int, float) for x in value)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return smollm2()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.eos_ids)


@pytest.fixture(scope="module", params=MAKERS)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, GrammarCompiler]:
    made = MAKERS[request.param]()
    return made, GrammarCompiler(made, made.eos_ids)


def babble(
    tokenizer: Tokenizer, compiler: GrammarCompiler, form: StructuredOutput, seed: int, **options: object
) -> tuple[str, SamplingState]:
    """An answer from random logits; signs that close are likelier, so that it ends."""
    params = SamplingParams(structured=form, seed=seed, **options)  # type: ignore[arg-type]
    state = SamplingState(params, [5], tokenizer.eos_ids, matcher=compiler.compile(form))
    text, sampler = Detokenizer(tokenizer, [], params), Sampler()
    noise = torch.Generator().manual_seed(seed)
    size = tokenizer.core.get_vocab_size()
    closing = [i for sign in ('"', "}", "]", ",") if (i := tokenizer.core.token_to_id(sign)) is not None]
    for _ in range(400):
        logits = torch.randn(1, size + 70, generator=noise) * 2
        logits[0, closing] += 9.0
        logits[0, size:] += 50.0  # rows of the model without a token
        token = sampler.sample(logits, [state])[0].token_id
        state.append(token)
        if token not in tokenizer.eos_ids:
            text.push(token)
        if state.finished:
            break
    text.finish()
    return text.text, state


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("schema", "fits"), [(PERSON, is_person), (POINT, is_point)], ids=["person", "point"]
)
def test_json_of_a_schema_always_fits(
    both: tuple[Tokenizer, GrammarCompiler], schema: dict[str, Any], fits: Callable[[Any], bool], seed: int
) -> None:
    text, state = babble(*both, StructuredOutput(json=schema), seed)
    assert state.finished
    assert fits(json.loads(text)), text


@pytest.mark.parametrize("seed", range(4))
def test_any_json_object(tokenizer: Tokenizer, compiler: GrammarCompiler, seed: int) -> None:
    text, state = babble(tokenizer, compiler, StructuredOutput(json_object=True), seed)
    assert state.finished
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-z]{3,8}(-[0-9]{2}){1,3}",
        r"^(yes|no|maybe/perhaps)$",
        r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}",
        r"(é|自然|😀){2,5}!?",
        r'"([^"\\\n]|\\["n]){0,20}"',
    ],
)
def test_a_regular_expression_matches_the_whole(
    both: tuple[Tokenizer, GrammarCompiler], pattern: str, seed: int
) -> None:
    text, state = babble(*both, StructuredOutput(regex=pattern), seed)
    assert state.finished
    assert re.fullmatch(pattern, text), text


def test_choices_are_taken_as_they_are_written(both: tuple[Tokenizer, GrammarCompiler]) -> None:
    choices = ("a", "ab", "a.b*", 'say "x"\n', "été", "自 😀", "\\d", "[/]", "{1}")
    found = {babble(*both, StructuredOutput(choice=choices), seed)[0] for seed in range(30)}
    assert found <= set(choices)
    assert len(found) >= 4


def test_a_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    form = StructuredOutput(grammar='start: "(" inner ")"\ninner: /[0-9]{1,3}/ | start start')
    digit = tokenizer.core.token_to_id("7")
    sizes = set()
    for seed in range(8):
        text, state = babble(tokenizer, compiler, form, seed, logit_bias={digit: 5.0})
        assert state.finished
        sizes.add(len(text))
        bare = re.sub(r"\([0-9]{1,3}\)", "o", text)
        while "(oo)" in bare:
            bare = bare.replace("(oo)", "o")
        assert bare == "o"
    assert len(sizes) > 2


def test_greedy_answers_obey_too(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    text, _ = babble(tokenizer, compiler, StructuredOutput(json=PERSON), 1, temperature=0)
    assert is_person(json.loads(text))


def test_white_space_has_an_end(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """A model that would go on with spaces for ever is brought back to the form."""
    matcher = compiler.compile(StructuredOutput(json=POINT))
    space, seen = tokenizer.encode(" ")[0], 0
    matcher.accept(tokenizer.encode("[")[0])
    for _ in range(100):
        logits = torch.zeros(1000)
        matcher.mask(logits)
        if logits[space] != 0:
            break
        matcher.accept(space)
        seen += 1
    assert 1 <= seen <= 40
    assert not matcher.finished


def test_the_mask_says_which_tokens_may_come(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Against a definition by hand: a token may come if some choice begins with the text so far and the token's."""
    choices = ["yes", "yet", "no"]
    matcher = compiler.compile(StructuredOutput(choice=choices))
    pieces = [tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.vocab_size)]
    for so_far in ("", "ye"):
        logits = torch.zeros(tokenizer.vocab_size + 3)
        matcher.mask(logits)
        allowed = {i for i, p in enumerate(pieces) if p and any(c.startswith(so_far + p) for c in choices)}
        assert set((logits == 0).nonzero()[:, 0].tolist()) == allowed
        assert set(logits.unique().tolist()) <= {0.0, -float("inf")}
        matcher.accept(tokenizer.encode("ye")[0])


def test_the_end_token_may_come_where_the_form_is_complete(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    matcher, end = compiler.compile(StructuredOutput(regex="a+")), tokenizer.eos_ids[0]
    letter = tokenizer.encode("a")[0]

    def ends() -> bool:
        logits = torch.zeros(tokenizer.vocab_size)
        matcher.mask(logits)
        return bool(logits[end] == 0)

    assert (ends(), matcher.complete, matcher.finished) == (False, False, False)
    matcher.accept(letter)
    assert (ends(), matcher.complete, matcher.finished) == (True, True, False)
    matcher.accept(end)
    assert (ends(), matcher.finished, matcher.error) == (True, True, None)
    matcher.accept(letter)  # after the end nothing happens any more
    assert matcher.error is None


def test_a_token_that_does_not_fit_is_told_in_one_line(
    tokenizer: Tokenizer, compiler: GrammarCompiler, capfd: pytest.CaptureFixture[str]
) -> None:
    matcher = compiler.compile(StructuredOutput(regex="a+"))
    matcher.accept(tokenizer.encode("b")[0])
    assert matcher.finished
    assert matcher.error is not None
    assert "satisfy the grammar" in matcher.error
    assert "\n" not in matcher.error
    assert capfd.readouterr() == ("", "")


def test_answers_do_not_share_their_place(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    form = StructuredOutput(choice=["ab"])
    first, second = compiler.compile(form), compiler.compile(form)
    first.accept(tokenizer.encode("ab")[0])
    assert (first.finished, second.finished) == (True, False)


def test_fewer_rows_than_tokens(compiler: GrammarCompiler) -> None:
    logits = torch.zeros(100)
    compiler.compile(StructuredOutput(regex="[a-z]+")).mask(logits)
    assert (logits == 0).any()


def test_grammars_are_read_once_and_old_ones_forgotten(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    made: list[str] = []
    compile_one = llguidance.LLMatcher

    def counted(read: Any, grammar: str, **options: Any) -> Any:
        made.append(grammar)
        return compile_one(read, grammar, **options)

    for name in ("grammar_from_lark", "grammar_from_json_schema"):
        setattr(counted, name, getattr(compile_one, name))
    monkeypatch.setattr(llguidance, "LLMatcher", counted)
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids)
    for _ in range(3):
        compiler.compile(StructuredOutput(json=PERSON))
    assert len(made) == 1
    for number in range(KEPT_GRAMMARS):
        compiler.compile(StructuredOutput(regex=f"a{number}"))
    compiler.compile(StructuredOutput(regex="a0"))
    assert len(made) == KEPT_GRAMMARS + 1
    compiler.compile(StructuredOutput(json=PERSON))
    assert len(made) == KEPT_GRAMMARS + 2


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (StructuredOutput(regex="a+("), r"structured\.regex: cannot be used: .*unclosed group"),
        (StructuredOutput(regex="(?=a)b"), r"structured\.regex: .*look-around.* not supported"),
        (StructuredOutput(json={"type": "objec"}), r"structured\.json: .*Invalid type: objec"),
        (StructuredOutput(json={"if": {}}), r'structured\.json: .*Unimplemented keys: \["if"\]'),
        (StructuredOutput(grammar="start: foo"), r"structured\.grammar: .*unknown name: \"foo\""),
    ],
)
def test_forms_that_do_not_compile(compiler: GrammarCompiler, form: StructuredOutput, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        compiler.compile(form)
    assert "\n" not in str(caught.value)


def test_without_the_library(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(tokenizer, tokenizer.eos_ids)
    with pytest.raises(RequestError, match=r"llguidance: pip install 'octad\[structured\]'"):
        compiler.compile(StructuredOutput(regex="a"))


def test_a_model_without_an_end_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no end token"):
        GrammarCompiler(tokenizer, []).compile(StructuredOutput(regex="a"))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"regex": "a{1000000}"}, "too large"),
        ({"regex": "(ab{1000}){1000}"}, "too large"),
        ({"grammar": "start: /x{900000}/"}, "too large"),
        ({"json": {"type": "string", "minLength": 10**6}}, "too large"),
        ({"regex": "a" * 500_000}, "too large"),
        ({"regex": "[a&&b]"}, "no text has this form"),
        ({"grammar": 'start: start "a"'}, "no text has this form"),
        ({"grammar": "start: a"}, 'unknown name: "a"'),
        ({"json": {"enum": []}}, "Unsatisfiable"),
    ],
)
def test_forms_that_no_answer_can_have_are_refused(form: dict[str, Any], told: str) -> None:
    compiler = GrammarCompiler(byte_tokenizer(), [95])
    with pytest.raises(RequestError, match=rf"^structured\.\w+: .*{told}"):
        compiler.compile(StructuredOutput(**form))


def test_a_form_that_fails_underway_is_no_stop(tiny_checkpoint: TinyCheckpoint) -> None:
    """The library gives up in the middle (here: it is made to): the finish reason says so, and not "stop"."""
    engine = make_engine(load(tiny_checkpoint("mixtral")))
    params = SamplingParams(temperature=0, max_tokens=20, structured=StructuredOutput(regex="[a-z]{5,9}"))
    engine.add_request("a", [1, 2, 3], params)
    engine.step()
    answer = next(iter(engine.answers.values()))[0]
    answer.state.matcher._core.consume_token(0)  # type: ignore[union-attr]  # "!", which does not fit
    finish(engine)
    found = engine.output("a").outputs[0]
    assert found.finish_reason == "error"
    assert isinstance(found.stop_reason, str)


def test_numbers_have_an_end() -> None:
    compiler, encode = GrammarCompiler(byte_tokenizer(), [95]), byte_tokenizer().encode
    for schema, text, taken in (
        ({"type": "integer"}, "9" * 100, 15),
        ({"type": "integer"}, "-12345", 6),
        ({"type": "number"}, "1." + "3" * 100, 11),
        ({"type": "number"}, "-12.25", 6),
        ({"type": ["null", "number"]}, "5" * 100, 15),
        ({"enum": [25]}, "25", 2),
    ):
        core = compiler.compile(StructuredOutput(json=schema))._core
        assert core.try_consume_tokens(encode(text)) == taken, schema


def test_what_a_schema_cannot_have_is_named_with_its_place() -> None:
    compiler = GrammarCompiler(byte_tokenizer(), [95])
    inner = {"type": "string", "pattern": "^(?!x)y"}
    for schema, place in (
        ({"type": "object", "properties": {"a": {"items": inner}}}, r"\$\.properties\.a\.items\.pattern"),
        ({"anyOf": [{"type": "null"}, {"not": {"type": "null"}}]}, r"\$\.anyOf\[1\]\.not"),
    ):
        with pytest.raises(RequestError, match=rf"cannot be used \(at {place}\)"):
            compiler.compile(StructuredOutput(json=schema))
