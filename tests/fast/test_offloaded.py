"""Experts on the disk: the same answers to the bit whatever fits in memory, what goes and what stays, what is refused."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import byte_tokenizer, prompts
from tiny_models import TinyCheckpoint

from octad import LLM, SamplingParams
from octad.checkpoint.extent import byte_view
from octad.checkpoint.load import open_source
from octad.errors import CheckpointError, RequestError
from octad.fast.expert_store import DECAY
from octad.fast.offloaded import memory_bytes
from octad.fast.record_reader import PIECE, RecordReader
from octad.fast.records import FILE
from octad.fast.saved import save_quantized
from octad.kernels.arena import fresh

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)


@pytest.fixture
def saved(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Any:
    """saved("mixtral") -> an int8 checkpoint with records."""
    torch.set_num_threads(1)

    def make(family: str, **changes: Any) -> Path:
        own = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
        sizes = {"hidden_size": 64, "intermediate_size": 128, "dtype": torch.bfloat16}
        made = tiny_checkpoint(family, **sizes | (own if family == "qwen2_moe" else {}) | changes)
        path = Path(shutil.copytree(made, tmp_path / family))
        byte_tokenizer().save(path)
        return save_quantized(open_source(path), tmp_path / f"{family}-int8", "int8")

    return make


def answers(llm: LLM, count: int) -> list[Any]:
    outputs = llm.generate(prompts(count), GREEDY)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_answers_are_those_of_a_model_in_memory(saved: Any, family: str, count: int) -> None:
    path = saved(family, num_hidden_layers=4)
    wanted = answers(LLM(path), count)
    store = LLM(path, memory=10**9).expert_store
    assert store is not None
    everything, one = len(store.layers) * store.E, store.stats.slot_bytes
    for slots in (everything, everything // 2, store.E):
        llm = LLM(path, memory=slots * one)
        assert answers(llm, count) == wanted, slots
        found = llm.expert_store
        assert found is not None
        assert found.stats.slots == slots
        assert int(found.here.sum()) <= slots
        assert (found.stats.hit_rate == 1.0) == (found.stats.misses == 0)
        assert found.stats.read >= found.stats.misses - found.stats.late


def test_with_room_for_all_nobody_asks_any_more(saved: Any) -> None:
    path = saved("mixtral", num_hidden_layers=4)
    llm = LLM(path, memory=10**9)
    store = llm.expert_store
    assert store is not None
    wanted, found, tokens = answers(LLM(path), 1), answers(llm, 1), store.stats.tokens
    while not store.settled:
        assert answers(llm, 1) == wanted
    assert found == answers(llm, 1) == wanted
    assert [layer._struct.store for layer in llm.model.model.layers] == [None] * 4
    assert store.here[store.layers].all()
    assert store.stats.tokens > tokens  # they are counted all the same


def test_what_is_used_least_goes(saved: Any) -> None:
    store = LLM(saved("mixtral"), memory=10**9).expert_store
    assert store is not None
    store.note([0], np.array([[[0, 1], [0, 2]]]))
    assert np.allclose(store._counts[0][:3], [DECAY + 1, DECAY, 1.0])
    store.note([0], np.array([[[1, 2]]]))
    assert np.allclose(store._counts[0][:3], [DECAY**2 + DECAY, DECAY**2 + 1, DECAY + 1])
    assert store.stats.requests == 5
    store._owner = [(0, e) for e in range(store.E)]
    store.here[0], store._slot_of[0] = 1, np.arange(store.E)
    assert store._room({(0, 0)}, urgent=True) == 1  # 0 has a smaller count, but is needed
    assert store.here[0].tolist()[:3] == [1, 0, 1]


def test_what_is_waited_for_comes_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PIECE))
    reader = RecordReader(tmp_path / "file", threads=0)
    tickets = [reader.ask(PIECE * n, byte_view(fresh(PIECE)), urgent=n == 2) for n in range(3)]
    reader.hurry(tickets[1])
    taken = [reader._take() for _ in range(3)]
    assert [one and one[0].offset // PIECE for one in taken] == [2, 1, 0]
    reader.close()


@pytest.mark.parametrize("cached", [True, False])
def test_records_are_read_in_pieces(tmp_path: Path, cached: bool) -> None:
    data = os.urandom(3 * PIECE + 4096)
    (tmp_path / "file").write_bytes(data)
    reader = RecordReader(tmp_path / "file", cached=cached)
    memory = byte_view(fresh(3 * PIECE))
    reader.wait([reader.ask(4096, memory, urgent=True)])
    assert bytes(memory) == data[4096:]
    with pytest.raises(CheckpointError, match="became shorter"):
        reader.wait([reader.ask(4 * PIECE, memory[:PIECE], urgent=True)])
    reader.close()


def test_a_forgotten_model_leaves_no_thread_and_no_file(saved: Any) -> None:
    llm = LLM(saved("mixtral"), memory=10**9)
    assert llm.expert_store is not None
    reader, threads = llm.expert_store.reader, llm.expert_store.reader._threads
    assert all(thread.is_alive() for thread in threads)
    del llm
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    shut = reader._shut
    del reader
    assert not shut.alive  # what it was to close is closed


def test_a_file_that_is_cut_ends_the_answer_in_one_line(saved: Any) -> None:
    path = saved("mixtral", num_hidden_layers=4)
    llm = LLM(path, memory="1 MB")
    os.truncate(path / FILE, 1 << 17)
    with pytest.raises((CheckpointError, RequestError), match="became shorter"):
        llm.generate(prompts(1), GREEDY)


def test_what_cannot_be_kept_is_refused(saved: Any, tmp_path: Path) -> None:
    path = saved("mixtral")
    with pytest.raises(RequestError, match=r"needs the 3 experts of a layer at once.*give that much or more"):
        LLM(path, memory="4kB")
    with pytest.raises(RequestError, match="give bytes, such as 300MB"):
        LLM(path, memory="much")
    with pytest.raises(RequestError, match=f"has no {FILE}.*octad quantize"):
        LLM(tmp_path / "mixtral", memory="300MB")
    (path / FILE).unlink()
    with pytest.raises(RequestError, match=f"has no {FILE}"):
        LLM(path, memory="300MB")
    with pytest.raises(RequestError, match="is dense"):
        LLM(saved("llama"), memory="300MB")


def test_sizes_as_people_write_them() -> None:
    given = {"300MB": 300e6, "1.5 GiB": 1.5 * 2**30, "2g": 2e9, "4096": 4096, 7: 7, "64kib": 65536}
    assert {text: memory_bytes(text) for text in given} == given
    for wrong in ("", "-3MB", "3 MBs", "GB", "0x10"):
        with pytest.raises(RequestError):
            memory_bytes(wrong)


def test_guesses_are_read_as_long_as_they_are_right(saved: Any) -> None:
    store = LLM(saved("mixtral", num_hidden_layers=4), memory=10**9).expert_store
    assert store is not None
    assert store._worth_guessing()
    for _ in range(5):
        store._guesses = {1: {2}}
        store._judge(1, {0, 1})
    assert not store._worth_guessing()
    store._guesses = {1: {2}}
    for _ in range(20):
        store._guesses = {1: {2}}
        store._judge(1, {0, 2})
    assert store._worth_guessing()


def test_steps_are_counted_together_as_one_after_the_other(saved: Any) -> None:
    store = LLM(saved("mixtral", num_hidden_layers=4), memory=10**9).expert_store
    assert store is not None
    rng, counts, requests = np.random.RandomState(0), np.zeros((4, store.E)), 0
    for step in range(100):
        experts = np.stack([[rng.permutation(store.E)[:2] for _ in range(1 + step // 90)] for _ in range(4)])
        store.note(range(4), experts)
        for row in range(experts.shape[1]):  # by hand: what was before counts DECAY times as much
            counts *= DECAY
            for layer in range(4):
                counts[layer, experts[layer, row]] += 1
        requests += sum(len(np.unique(layer)) for layer in experts)
    assert np.allclose(store._counts, counts)
    assert (store.stats.requests, store.stats.tokens) == (requests, 110)


def test_a_process_that_ends_while_records_are_read_ends_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PIECE))
    program = f"""
import atexit, time
import octad.fast.record_reader as room
read = room.portable.read_into
room.portable.read_into = lambda *given: (time.sleep(0.1), read(*given))[1]
atexit.register(lambda: print(any(thread.is_alive() for thread in reader._threads)))  # the last to be called
reader = room.RecordReader(room.Path({str(tmp_path / "file")!r}))
memory = bytearray(room.PIECE)
for _ in range(9):
    reader.ask(0, memoryview(memory), urgent=False)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
