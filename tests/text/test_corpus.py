"""Data sets of the `datasets` library give the documents that went in; whatever cannot be opened is one line."""

import json
from pathlib import Path

import pytest
from small import character_tokenizer, texts

from octad.dist import World
from octad.errors import DataError
from octad.text.corpus import hub_parts, open_documents
from octad.text.tokenizer import Tokenizer
from octad.train.shards import encode_answers
from octad.train.shares import open_shard

datasets = pytest.importorskip("datasets")
ROWS = texts(6)


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def documents(reference: object, field: str = "text") -> list[object]:
    return list(open_documents(str(reference)).read(field, None))


def test_a_saved_data_set_its_files_and_a_loaded_one_are_the_same(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ROWS, "n": list(range(6))})
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    made.to_parquet(tmp_path / "folder" / "train.parquet")
    made.to_parquet(tmp_path / "folder" / "test.parquet")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for reference in (tmp_path / "saved", arrow, tmp_path / "folder" / "train.parquet"):
        assert documents(reference) == ROWS
    assert documents(f"hf:{tmp_path / 'folder'}:test") == ROWS


def test_splits_columns_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parts = {"train": {"body": ROWS}, "test": {"messages": [chat]}}
    made = {name: datasets.Dataset.from_dict(columns) for name, columns in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"both: has the splits test, train; name one: .*both/test"):
        documents(tmp_path / "both")
    assert documents(tmp_path / "both" / "train", "body") == ROWS
    assert documents(tmp_path / "both" / "test") == [chat]
    with pytest.raises(
        DataError, match=r"train row 1: expected an object with 'text'.*found keys body; set field:"
    ):
        documents(tmp_path / "both" / "train")


def test_tokens_are_made_once_and_anew_for_other_rows(tmp_path: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS[:-1])):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / name)
    cache, tokenizer = tmp_path / "cache", character_tokenizer()
    first = open_shard(World(), [tmp_path / "a"], tokenizer, cache=cache)
    again = open_shard(World(), [tmp_path / "a"], tokenizer, cache=cache)
    assert first.tokens.tolist() == again.tokens.tolist()
    assert len(list(cache.iterdir())) == 1
    assert len(open_shard(World(), [tmp_path / "b"], tokenizer, cache=cache).starts) == len(first.starts) - 1


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("hf:a/b", ("a/b", None, "train")),
        ("hf:a/b:test", ("a/b", None, "test")),
        ("hf:a/b:train[:10%]", ("a/b", None, "train[:10%]")),
        ("hf:a/b:fr", ("a/b", "fr", "train")),
        ("hf:a/b:fr:test", ("a/b", "fr", "test")),
        ("hf:a/b:fr:train[:10%]", ("a/b", "fr", "train[:10%]")),
    ],
)
def test_hub_references(reference: str, parts: tuple[str, str | None, str]) -> None:
    assert hub_parts(reference) == parts


@pytest.mark.parametrize("reference", ["hf:", "hf:a:", "hf:a:b:c:d", "hf::train"])
def test_malformed_hub_references(reference: str) -> None:
    with pytest.raises(DataError, match="expected hf:NAME, hf:NAME:SUBSET"):
        hub_parts(reference)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:nobody/nothing", "hf:nobody/nothing: cannot be loaded from the hub or its cache"),
        (
            "nowhere",
            "nowhere: no such file; give .jsonl, .txt or .parquet, a data set's directory or hf:NAME",
        ),
        ("empty", "empty: is a directory but no data set"),
        ("broken.arrow", "broken.arrow: cannot be loaded"),
        ("damaged", "damaged: cannot be loaded"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch, reference: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    (tmp_path / "broken.arrow").write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        documents(reference)
    assert "\n" not in str(caught.value)


# ---- answers only, against a template worked out by hand ------------------------------------------------------

CHATML = (
    "{% if messages[0].role != 'system' %}<s>system\nBe.<e>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_chatml_learns_each_answer_and_its_end_and_nothing_else() -> None:
    plain = character_tokenizer(256)
    plain.core.add_special_tokens(["<s>", "<e>"])
    end = plain.core.token_to_id("<e>")
    tokenizer = Tokenizer(plain.core, {"eos_token": "<e>", "chat_template": CHATML}, [end])
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "no"},
    ]
    ids, learn = encode_answers(json.loads(json.dumps(chat)), tokenizer)
    by_hand = [
        ("<s>system\nBe.<e>\n<s>user\nhi<e>\n<s>assistant\n", 0),
        ("yes<e>", 1),
        ("\n<s>user\nand<e>\n<s>assistant\n", 0),
        ("no<e>", 1),
        ("\n", 0),
    ]
    expected = [(i, flag) for text, flag in by_hand for i in plain.core.encode(text).ids]
    assert list(zip(ids, learn, strict=True)) == expected
