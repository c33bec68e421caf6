"""Text as windows: budgets, turns, bytes, chats, and the errors of files."""

import gzip
import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from members import save_tokenizer

from octad.errors import DataError
from octad.text.documents import read_documents
from octad.text.tokenizer import Tokenizer
from octad.text.windows import (
    SHORTEST_WINDOW,
    batches,
    encode_document,
    pad,
    read_windows,
)

MULTILINGUAL = (
    "Grüße aus Köln, l'été à Paris, ¿qué tal?",
    "Привет, мир! Καλημέρα κόσμε.",
    "你好，世界。こんにちは世界。안녕하세요",
    "नमस्ते दुनिया مرحبا بالعالم שלום",
    "👩‍👩‍👧 🏴󠁧󠁢󠁷󠁬󠁳󠁿 é \t\n  spaces   and\r\nlines",
    "<|end|> spelt in text",
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a byte, and a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def bytewise(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


def trained(directory: Path, kind: str) -> Tokenizer:
    """A small tokenizer with merges, trained on the texts: byte-level, or spaces as ▁ with byte fallback."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=kind == "fallback", unk_token=None))
    if kind == "byte-level":
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = tokenizers.decoders.ByteLevel()
        start = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=start, special_tokens=[])
    else:
        core.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
        core.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Fuse()])
        spelled = [f"<0x{b:02X}>" for b in range(256)]
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=[])
    core.train_from_iterator(MULTILINGUAL[:2] * 3, trainer)
    if kind == "fallback":  # bytes belong to the vocabulary, not to the added tokens
        raw = json.loads(core.to_str())
        vocabulary = raw["model"]["vocab"]
        for token in spelled:
            vocabulary[token] = len(vocabulary)
        core = tokenizers.Tokenizer.from_str(json.dumps(raw))
    core.add_special_tokens(["<|end|>"])
    core.add_tokens(["Привет", "世界"])
    core.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return Tokenizer.from_directory(directory)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


# ---- windows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [16, 100, 333, 1000])
def test_the_budget_is_kept(bytewise: Tokenizer, tmp_path: Path, tokens: int) -> None:
    file = write(tmp_path / "a.jsonl", [letter * 90 for letter in "abcdef"])
    windows = read_windows([file], bytewise, tokens=tokens, window=32)
    assert sum(len(w.ids) for w in windows) == min(tokens, 6 * 90)
    assert all(2 <= len(w.ids) <= 32 for w in windows)


def test_documents_take_turns(bytewise: Tokenizer, tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", ["a" * 100, "b" * 20]), write(tmp_path / "b.jsonl", ["c" * 64])]
    windows = read_windows(files, bytewise, tokens=10000, window=32)
    spelled = [bytewise.decode(w.ids) for w in windows]
    assert spelled == ["a" * 32, "b" * 20, "c" * 32, "a" * 32, "c" * 32, "a" * 32]  # 4 of a are left out
    assert [w.document for w in windows] == [0, 1, 2, 0, 2, 0]


def test_a_small_budget_sees_the_whole_file(bytewise: Tokenizer, tmp_path: Path) -> None:
    """Of many documents, few are taken, evenly."""
    texts = [f"{number:03d} " * 16 for number in range(200)]
    windows = read_windows([write(tmp_path / "a.jsonl", texts)], bytewise, tokens=160, window=16)
    first = sorted(int(bytewise.decode(w.ids)[:3]) for w in windows)
    assert len(first) == len(set(first)) == 10
    assert first[-1] > 100


def test_a_budget_of_few_windows_sees_all_sources(bytewise: Tokenizer, tmp_path: Path) -> None:
    """Ten windows of long documents, of files that follow each other: some of each, not the first file alone."""
    files = [
        write(tmp_path / f"{name}.jsonl", [f"{name}{number:02d} " * 40 for number in range(20)])
        for name in "abcde"
    ]
    windows = read_windows(files, bytewise, tokens=640, window=64)
    counts = [sum(bytewise.decode(w.ids).startswith(name) for w in windows) for name in "abcde"]
    assert sum(counts) == 10
    assert min(counts) >= 1
    assert max(counts) <= 3


def test_windows_from_anywhere(bytewise: Tokenizer, tmp_path: Path) -> None:
    """Beginnings of half the documents, other places of the rest; all of each in the end."""
    texts = ["".join(f"{letter}{place:03d}" for place in range(64)) for letter in "abcdefgh"]
    file = write(tmp_path / "a.jsonl", texts)
    few = read_windows([file], bytewise, tokens=8 * 32, window=32, anywhere=True)
    first = [bytewise.decode(w.ids) for w in few]
    assert [text[0] for text in first] == list("abcdefgh")
    places = [int(text[1:4]) for text in first]
    assert places[::2] == [0, 0, 0, 0]
    assert len(set(places[1::2])) == 4
    assert all(place >= 8 for place in places[1::2])
    whole = read_windows([file], bytewise, tokens=10**6, window=32, anywhere=True)
    assert sorted(bytewise.decode(w.ids) for w in whole) == sorted(
        text[i : i + 32] for text in texts for i in range(0, 256, 32)
    )


def test_conversations_from_their_beginnings(bytewise: Tokenizer, tmp_path: Path) -> None:
    """Two windows long, so that an answer comes with its question."""
    chats = [
        [{"role": "user", "content": f"{n}?" * 9}, {"role": "assistant", "content": f"{n}." * 40}]
        for n in range(4)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    found = read_windows([file], bytewise, tokens=4 * 64, window=32, anywhere=True)
    assert [bytewise.decode(w.ids) for w in found] == [
        (f"<user>{n}?{n}?{n}?{n}?{n}?{n}?{n}?{n}?{n}?<assistant>" + f"{n}." * 40)[:64] for n in range(4)
    ]


def test_conversations_beside_short_windows(bytewise: Tokenizer, tmp_path: Path) -> None:
    """They may be longer than two windows, and crowd out no text that comes behind them."""
    chat = [{"role": "user", "content": "?" * 9}, {"role": "assistant", "content": "." * 90}]
    rows = [{"messages": chat}] * 8 + [{"text": "t" * 99}] * 8
    file = tmp_path / "both.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_windows([file], bytewise, tokens=600, window=32, anywhere=True, conversation=100)
    texts = [bytewise.decode(w.ids) for w in found]
    talks = [text for text in texts if text.startswith("<user>")]
    assert {len(text) for text in talks[:-1]} == {100}
    assert 3 <= len(talks) <= 5
    assert 3 <= sum(set(text) == {"t"} for text in texts) <= 8  # none, if all were counted alike


def test_windows_are_the_text_in_order(bytewise: Tokenizer, tmp_path: Path) -> None:
    text = " ".join(MULTILINGUAL) * 3
    file = tmp_path / "plain.txt"
    file.write_bytes(text.encode())
    windows = read_windows([file], bytewise, tokens=100000, window=50)
    ids = [i for w in windows for i in w.ids]
    whole = bytewise.encode(text.replace("\r\n", "\n"), parse_special=False)
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) < SHORTEST_WINDOW
    assert all(w.predicted_bytes == len(w.ids) - 1 for w in windows)  # one token a byte


def test_padding_and_batches(bytewise: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ["x" * n for n in (20, 64, 33, 17, 64)])
    windows = read_windows([file], bytewise, tokens=10000, window=64)
    made = list(batches(windows, 128))
    assert sorted(id(w) for b in made for w in b.windows) == sorted(map(id, windows))
    for batch in made:
        assert batch.tokens.shape == batch.mask.shape
        assert batch.tokens.numel() <= 128
        for row, window in enumerate(batch.windows):
            assert tuple(batch.tokens[row][batch.mask[row]].tolist()) == window.ids
            assert not batch.mask[row, len(window.ids) :].any()
    assert pad(windows[:1]).mask.all()


# ---- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte-level", "fallback"])
@pytest.mark.parametrize("text", MULTILINGUAL)
def test_token_lengths_sum_to_the_text(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, kind)
    lengths = tokenizer.byte_lengths
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert sum(lengths[i] for i in ids) == len(text.encode())
    assert len(lengths) == tokenizer.vocab_size


def test_predicted_bytes_leave_out_the_first_token(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path, "byte-level")
    text = MULTILINGUAL[2] * 3
    (window,) = read_windows([write(tmp_path / "a.jsonl", [text])], tokenizer, tokens=999, window=999)
    piece = tokenizer.core.id_to_token(window.ids[0])  # one character of the byte alphabet a byte
    assert 0 < window.predicted_bytes == len(text.encode()) - len(piece)


# ---- files ---------------------------------------------------------------------------------------------------


def test_kinds_of_files(tmp_path: Path) -> None:
    lines = '{"text": "été"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    expected = ["été", [{"role": "user", "content": "hi"}]]
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_documents(tmp_path / name)) == expected
    for name in ("a.txt", "a.txt.gz"):
        assert list(read_documents(tmp_path / name)) == [lines]


def test_chats_go_through_the_template(bytewise: Tokenizer, directory: Path) -> None:
    chat = [{"role": "user", "content": "été?"}, {"role": "assistant", "content": "oui"}]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    expected = theirs.apply_chat_template(chat, tokenize=False)
    ids = encode_document(chat, bytewise)
    assert bytewise.decode(ids) == expected == "<user>été?<assistant>oui"
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]


def test_control_tokens_in_text_are_text(bytewise: Tokenizer) -> None:
    ids = encode_document("a <|end|> b", bytewise)
    assert not set(ids) & bytewise.special_ids
    assert bytewise.decode(ids) == "a <|end|> b"


BAD: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "x"}\n\n{"text"\n', r"a\.jsonl line 3: not JSON"),
    ("a.jsonl", b'{"txt": "x", "id": 3}\n', r"a\.jsonl line 1: expected .* keys id, txt"),
    ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl line 1: 'text' should be a text, found a number"),
    ("a.jsonl", b'["x"]\n', r"a\.jsonl line 1: expected .* found list"),
    ("a.jsonl", b"[" * 100000 + b"\n", r"a\.jsonl line 1: not JSON"),
    ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 text \(byte 3\)"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20],
        r"a\.jsonl\.gz: damaged compressed file",
    ),
    ("a.txt.gz", b"plain", r"a\.txt\.gz: damaged compressed file"),
    ("a.jsonl", b"", r"a\.jsonl: no document"),
    ("a.jsonl", b'{"text": "' + b"x" * (SHORTEST_WINDOW - 1) + b'"}\n', r"a\.jsonl: no document"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files(bytewise: Tokenizer, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_windows([tmp_path / name], bytewise, tokens=100, window=32)
    assert "\n" not in str(caught.value)


def test_no_file(bytewise: Tokenizer, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "none.jsonl", "no such file")):
        with pytest.raises(DataError, match=message):
            read_windows([path], bytewise, tokens=100, window=32)
