"""Text that comes token by token against the same tokens decoded at once."""

import random
from collections.abc import Sequence

import pytest
from vocabularies import TEXTS, sentencepiece, smollm2

from octad.engine.detokenize import Detokenizer, token_text
from octad.engine.params import SamplingParams
from octad.text.tokenizer import Tokenizer

MAKERS = {"bytes": smollm2, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return smollm2()


@pytest.fixture(scope="module")
def pieced() -> Tokenizer:
    return sentencepiece()


def stream(
    tokenizer: Tokenizer, answer: Sequence[int], prompt: Sequence[int] = (), **options: object
) -> tuple[list[str], Detokenizer]:
    """What each push said, and `finish` last."""
    made = Detokenizer(tokenizer, prompt, SamplingParams(**options))  # type: ignore[arg-type]
    said = [made.push(token) for token in answer]
    said.append(made.finish())
    assert made.text == "".join(said)
    return said, made


# ---- characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    said, _ = stream(tokenizer, ids)
    assert "".join(said) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said), "half a character was shown"


def test_a_character_of_several_tokens_comes_whole_and_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a𝔘b")
    begin, end = len(tokenizer.encode("a")), len(tokenizer.encode("b"))
    assert len(ids) >= 4
    made = Detokenizer(tokenizer, [], SamplingParams())
    said = [made.push(token) for token in ids]
    whole = next(i for i, piece in enumerate(said) if "𝔘" in piece)
    assert "".join(said[:whole]) == "a"
    assert said[begin:whole] == [""] * (whole - begin)
    assert whole >= begin
    assert end >= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_of_a_byte_level_vocabulary(byte_level: Tokenizer, seed: int, skip: bool) -> None:
    """Most of them are halves of characters; control tokens are among them."""
    draw = random.Random(seed)
    high = 400 if seed % 2 else byte_level.vocab_size  # the first ids are control tokens and single bytes
    ids = [draw.randrange(high) for _ in range(400)]
    said, _ = stream(byte_level, ids, skip_special_tokens=skip)
    assert "".join(said) == byte_level.decode(ids, skip)


@pytest.mark.parametrize("seed", range(8))
def test_random_pieces(pieced: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    ids = [draw.choice([*range(3), *range(259, pieced.vocab_size)]) for _ in range(300)]
    said, _ = stream(pieced, ids)
    assert "".join(said) == pieced.decode(ids)


@pytest.mark.parametrize("garbage", [[0x80], [0xF0, 0x9F], [0xE4] * 50, [*range(0x80, 0xC0)]])
def test_after_bytes_that_are_no_text_the_text_goes_on(pieced: Tokenizer, garbage: list[int]) -> None:
    byte = {value: pieced.core.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    words = pieced.encode("the world")
    ids = [*words, *(byte[b] for b in garbage), *words, *(byte[b] for b in "ሰላም".encode()), *words]
    text = "".join(stream(pieced, ids)[0])
    assert text.startswith("the world\ufffd")
    assert text.endswith("\ufffd the worldሰላም the world")
    assert set(text) == set("the worldሰላም\ufffd")


def test_an_answer_that_ends_inside_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("𝔘")
    said, _ = stream(byte_level, ids[:-1])
    assert said == [""] * (len(ids) - 1) + ["\ufffd"]


# ---- the border between prompt and answer ------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_continues_its_prompt(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text + " " + text)
    whole, tested = tokenizer.decode(ids), 0
    for border in range(1, len(ids)):
        before = tokenizer.decode(ids[:border])
        if before and whole.startswith(before) and not before.endswith("\ufffd"):
            said, _ = stream(tokenizer, ids[border:], ids[:border])
            assert before + "".join(said) == whole
            tested += 1
    assert tested > 3


def test_words_after_a_prompt_keep_their_space(pieced: Tokenizer) -> None:
    prompt, answer = pieced.encode("hello"), pieced.encode("world the")
    assert "".join(stream(pieced, answer, prompt)[0]) == " world the"
    assert "".join(stream(pieced, answer, [])[0]) == "world the"
    assert "".join(stream(pieced, answer, [*prompt, 2])[0]) == "world the"  # after a control token


def test_a_prompt_that_ends_inside_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("𝔘 and more")
    assert "".join(stream(byte_level, ids[2:], ids[:2])[0]).endswith(" and more")


# ---- tokens without text -----------------------------------------------------------------------------------


def test_control_tokens_are_shown_only_on_request(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("<|im_start|>Hi<|im_end|>")]
    assert "".join(stream(byte_level, ids)[0]) == "Hi"
    assert "".join(stream(byte_level, ids, skip_special_tokens=False)[0]) == "<|im_start|>Hi<|im_end|>"


def test_ids_that_the_tokenizer_does_not_have(tokenizer: Tokenizer) -> None:
    beyond = [tokenizer.vocab_size + 5] * 3
    ids = tokenizer.encode("hello world")
    assert "".join(stream(tokenizer, [*beyond, ids[0], *beyond, *ids[1:], *beyond])[0]) == "hello world"


def test_one_tokens_text(tokenizer: Tokenizer) -> None:
    for text in (" hello", "hello", "the", "\n", ",", " "):
        ids = tokenizer.core.encode("a" + text, add_special_tokens=False).ids
        assert "".join(token_text(tokenizer, token) for token in ids).removeprefix(" ") == "a" + text
    end = tokenizer.eos_ids[0]
    assert token_text(tokenizer, end) == tokenizer.core.id_to_token(end)
    assert token_text(tokenizer, tokenizer.vocab_size + 9) == ""


# ---- cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "halves", "control", "unknown"])
def test_a_token_costs_the_same_wherever_it_stands(
    byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    half = byte_level.encode("𝔘")[0]
    tokens = {"words": byte_level.encode(" word")[0], "halves": half, "control": 2, "unknown": 10**6}
    decoded, decode = [], Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    stream(byte_level, [tokens[kind]] * 2000, byte_level.encode("x" * 3000))
    assert sum(decoded) < 2000 * 40
    assert max(decoded, default=0) < 40


# ---- stop strings ------------------------------------------------------------------------------------------


def cut(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The definition: read letter by letter, stop as soon as the text read ends with a stop string (the longest)."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_wherever_the_tokens_end(tokenizer: Tokenizer, seed: int) -> None:
    draw = random.Random(seed)
    text = draw.choice(TEXTS) + draw.choice([" ", ""]) + draw.choice(TEXTS)
    ids = tokenizer.encode(text)
    text = tokenizer.decode(ids)
    stops = ["no such thing", "world?"]
    for _ in range(draw.randrange(3)):
        begin = draw.randrange(len(text) - 5)
        stops.append(text[begin : begin + draw.randrange(1, 12)] + draw.choice(["", "", "x"]))
    include = draw.random() < 0.3
    expected, stop = cut(text, stops, include)
    said, made = stream(tokenizer, ids, stop=stops, include_stop_str_in_output=include)
    assert "".join(said) == expected
    assert made.stopped == stop


def test_nothing_is_shown_that_a_stop_string_takes_back(byte_level: Tokenizer) -> None:
    made = Detokenizer(byte_level, [], SamplingParams(stop=["\n\nUser:", "END"]))
    tokens = [byte_level.encode(text)[0] for text in ("yes", "\n", "\n", "no", "E", "N", "d", "\n", "E")]
    assert [made.push(token) for token in tokens] == ["yes", "", "", "\n\nno", "", "", "ENd", "", "\n"]
    assert made.finish() == "E"
    assert made.stopped is None


def test_after_a_stop_string_there_is_nothing(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("one, two, three")
    made = Detokenizer(byte_level, [], SamplingParams(stop=","))
    assert "".join(made.push(token) for token in ids) == "one"
    assert (made.finish(), made.text, made.stopped) == ("", "one", ",")


def test_stop_strings_wait_for_the_minimum(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a b a b a b")
    said, made = stream(byte_level, ids, stop=["b"], min_tokens=3)
    assert ("".join(said), made.stopped) == ("a b a ", "b")
