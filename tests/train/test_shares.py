"""All ranks tokenise, each its share: the bytes that one process writes, and no document twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import character_tokenizer, jsonl, texts
from threaded_world import on_ranks

from octad.dist import World
from octad.errors import DataError
from octad.text.tokenizer import Tokenizer
from octad.train import shards, shares
from octad.train.shares import open_shard

TOKENIZER = character_tokenizer()
CHAT = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cd"}]}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, shares):
        monkeypatch.setattr(module, "BATCH", 4)


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("*/*")}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "rows", [texts(30), [*texts(9), "", CHAT, *texts(5, 1), CHAT, ""], ["a", "b"], [CHAT] * 9]
)
def test_ranks_make_the_shard_of_one(tmp_path: Path, monkeypatch, ranks: int, rows: list[Any]) -> None:
    files = [jsonl(tmp_path / "one.jsonl", rows), jsonl(tmp_path / "two.jsonl", texts(3, 2))]
    want = open_shard(World(), files, TOKENIZER, cache=tmp_path / "alone")
    read: list[str] = []
    encode = Tokenizer.encode_batch

    def counted(self: Tokenizer, batch: list[str], **options: Any) -> list[list[int]]:
        read.extend(batch)
        return encode(self, batch, **options)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    found = on_ranks(ranks, lambda world: open_shard(world, files, TOKENIZER, cache=tmp_path / "all"))
    for shard in found:
        assert np.array_equal(shard.tokens, want.tokens)
        assert np.array_equal(shard.starts, want.starts)
    assert contents(tmp_path / "all") == contents(tmp_path / "alone")
    assert len(read) == sum(isinstance(row, str) for row in rows) + 3
    read.clear()
    on_ranks(ranks, lambda world: open_shard(world, files, TOKENIZER, cache=tmp_path / "all"))
    assert read == []
    assert [path.name for path in (tmp_path / "all").glob(".*")] == []


def test_ranks_that_see_no_common_cache_make_their_own(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "one.jsonl", texts(20))
    open_shard(World(), [file], TOKENIZER, cache=tmp_path / "alone")

    def own(world: World) -> Any:
        shares_cache = tmp_path / f"machine{world.rank}"
        return open_shard(world, [file], TOKENIZER, cache=shares_cache)

    on_ranks(2, own)
    for rank in range(2):
        assert contents(tmp_path / f"machine{rank}") == contents(tmp_path / "alone")


def test_what_one_rank_finds_wrong_all_say(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "one.jsonl", [*texts(20), {"messages": [{"role": "assistant"}]}])
    found = on_ranks(3, lambda world: open_shard(world, [file], TOKENIZER, cache=tmp_path / "all"))
    assert all(isinstance(error, DataError) for error in found), found
    assert len({str(error) for error in found}) == 1
    assert list((tmp_path / "all").iterdir()) == []
