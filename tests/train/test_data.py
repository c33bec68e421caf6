"""Data: every format gives the same tokens, windows hold what was written, the position restores exactly."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small import character_tokenizer, jsonl, texts

from octad.dist import World
from octad.errors import DataError
from octad.fast.document_attention import DocumentAttention
from octad.model.config import ModelConfig
from octad.text.documents import read_documents
from octad.train.data import IGNORED, Source, Stream
from octad.train.shards import Shard, encode_answers, token_cache
from octad.train.shares import open_shard

TOKENIZER = character_tokenizer()


def shard(path: Path, name: str = "a", **options: object) -> Shard:
    return open_shard(
        World(), [jsonl(path / f"{name}.jsonl", texts(40, len(name)))], TOKENIZER, cache=path, **options
    )


# ---- documents and shards ----------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    zstandard, parquet = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow.parquet")
    rows = texts(5)
    plain = jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    parquet.write_table(__import__("pyarrow").table({"text": rows}), tmp_path / "d.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert list(read_documents(path)) == rows
    (tmp_path / "e.txt").write_text("one\ntwo\n")
    assert list(read_documents(tmp_path / "e.txt")) == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl line 1: expected an object with 'text'.*found keys body"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl line 2: not UTF-8"),
        ("a.txt", b"\xff", "a.txt: not UTF-8"),
        ("a.jsonl", b"\n", "no text"),
        ("a.jsonl.gz", b"nothing", "damaged compressed file"),
        ("a.jsonl.zst", b"nothing", "damaged compressed file"),
        ("a.parquet", b"nothing", "cannot be read as Parquet"),
    ],
)
def test_unusable_data_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(World(), [tmp_path / name], TOKENIZER, cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*"))


def test_shard_is_made_once_and_anew_for_other_bytes(tmp_path: Path) -> None:
    first = shard(tmp_path)
    made = sorted(p.name for p in tmp_path.iterdir())
    again = shard(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == made
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert TOKENIZER.decode(first.tokens[: first.starts[1]].tolist()) == texts(40, 1)[0]
    assert first.tokens[first.starts[1] - 1] == TOKENIZER.eos_ids[0]
    shard(tmp_path, append_eos=False)
    assert len(list(tmp_path.iterdir())) == len(made) + 1


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "digests", "nonsense"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    whole = shard(tmp_path, "one", append_eos=False)
    tokens, file = whole.tokens.copy(), Path(str(whole.tokens.filename))
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    if damage == "digests":
        (file.parent / "digests.json").unlink()
    elif damage == "nonsense":
        (file.parent / "digests.json").write_text("[1, 2]")
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data if damage == "bit" else data[:-4])
    again = shard(tmp_path, "one", append_eos=False)
    assert (again.tokens == tokens).all()
    assert shard(tmp_path, "one", append_eos=False).tokens.tolist() == tokens.tolist()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_chat_learns_the_answers_only() -> None:
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "no"},
    ]
    ids, learn = encode_answers(chat, TOKENIZER)
    assert ids == TOKENIZER.encode_chat(chat, add_generation_prompt=False)
    learnt = [i for i, flag in zip(ids, learn, strict=True) if flag]
    assert TOKENIZER.decode(learnt, skip_special_tokens=False) == "yes<|end|>no<|end|>"


# ---- windows -----------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_token_once(tmp_path: Path) -> None:
    data = shard(tmp_path)
    stream = Stream([Source("a", data)], window=16, document_mask=False)
    count = (len(data.tokens) - 1) // 16
    seen = Counter(stream.next(count).tokens.flatten().tolist())
    missing = Counter(data.tokens.tolist()) - seen
    assert sum(missing.values()) == len(data.tokens) - count * 16 <= 16
    assert not seen - Counter(data.tokens.tolist())


def test_targets_follow_tokens_and_stop_at_documents(tmp_path: Path) -> None:
    batch = Stream([Source("a", shard(tmp_path))], window=64).next(10)
    ends = batch.tokens == TOKENIZER.eos_ids[0]
    assert ends.any()
    assert (batch.targets[ends] == IGNORED).all()
    inside = ~ends[:, :-1]
    torch.testing.assert_close(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])
    torch.testing.assert_close(batch.documents.diff(dim=1) == 1, ends[:, :-1])


def test_chat_targets_are_masked(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q" * 9}, {"role": "assistant", "content": "w" * 9}]}
    data = open_shard(World(), [jsonl(tmp_path / "c.jsonl", [chat] * 9)], TOKENIZER, cache=tmp_path)
    targets = Stream([Source("a", data)], window=20).next(4).targets
    asked, answered = TOKENIZER.encode("q")[0], TOKENIZER.encode("w")[0]
    assert (targets == answered).any()
    assert not (targets == asked).any()


def test_mixing_keeps_the_weights_at_every_moment(tmp_path: Path) -> None:
    sources = [Source("a", shard(tmp_path, "a"), 3.0), Source("bb", shard(tmp_path, "bb"), 1.0)]
    stream = Stream(sources, window=8)
    for n in range(1, 60):
        stream.next(1)
        assert abs(stream.taken[0] - 0.75 * n) <= 1


def test_position_restores_exactly(tmp_path: Path) -> None:
    def fresh() -> Stream:
        return Stream(
            [Source("a", shard(tmp_path, "a"), 2.0), Source("bb", shard(tmp_path, "bb"))], window=32, seed=5
        )

    whole, part = fresh(), fresh()
    expected = torch.cat([whole.next(7).tokens for _ in range(40)])
    part.next(7 * 23)
    state = json.loads(json.dumps(part.state_dict()))
    rest = fresh()
    rest.load_state_dict(state)
    torch.testing.assert_close(rest.next(7 * 17).tokens, expected[7 * 23 :], rtol=0, atol=0)
    assert not torch.equal(
        Stream([Source("a", shard(tmp_path))], window=32, seed=6).next(5).tokens, expected[:5]
    )


def test_too_little_text_is_one_line(tmp_path: Path) -> None:
    data = open_shard(World(), [jsonl(tmp_path / "s.jsonl", ["short"])], TOKENIZER, cache=tmp_path)
    with pytest.raises(DataError, match="has 6 tokens, one window needs 17"):
        Stream([Source("s", data)], window=16)


# ---- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_compute_what_each_does_alone(tiny_model, window) -> None:
    from octad.model.transformer import Transformer

    theirs = tiny_model("mistral", sliding_window=window)
    config = ModelConfig.from_dict(theirs.config.to_dict())
    model = Transformer(config)
    model.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 96, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(tokens, DocumentAttention(config, documents))
        alone = [theirs(tokens[:, :5]).logits, theirs(tokens[:, 5:]).logits]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def test_where_tokens_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OCTAD_CACHE", str(tmp_path))
    assert token_cache(None) == tmp_path / "tokens"
    assert token_cache("~/elsewhere") == Path("~/elsewhere")  # opened with the home directory's name put in
