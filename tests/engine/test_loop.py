"""One thread owns the engine: streams from many threads and from asyncio, and nobody's deltas get lost."""

import asyncio
import gc
import io
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import GREEDY, byte_tokenizer, ids, load, make_engine, prompts, run
from tiny_models import TinyCheckpoint

from octad import LLM, SamplingParams
from octad.chat.speakers import speak
from octad.engine.loop import EngineLoop
from octad.errors import RequestError
from octad.evaluate.tasks.answers import write
from octad.model.transformer import Transformer

LONG = replace(GREEDY, max_tokens=60)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: TinyCheckpoint) -> Transformer:
    return load(tiny_checkpoint("mixtral"))


@pytest.fixture
def loop(model: Transformer) -> EngineLoop:
    return EngineLoop(make_engine(model))


def alone(model: Transformer, prompt: list[int], params: SamplingParams) -> list[int]:
    return ids(run(make_engine(model), [prompt], params))[0]


def test_an_open_stream_goes_on_whoever_drives_the_engine(model: Transformer) -> None:
    """Tasks, printing, a batch, even somebody who steps by hand: the stream gets every token of its own."""
    llm = LLM((model, byte_tokenizer()), block_size=4, num_blocks=256)
    stream = llm.stream([1, 2, 3], LONG)
    found = list(next(stream).token_ids)
    write(llm, ["abc", "de"], replace(GREEDY, max_tokens=5))
    found += next(stream).token_ids
    speak(llm, [5, 6], GREEDY, Console(file=io.StringIO()))
    llm.generate([[7, 8]], GREEDY)
    while llm.engine.has_unfinished():
        llm.engine.step()
    found += [token for delta in stream for token in delta.token_ids]
    assert found == alone(model, [1, 2, 3], LONG)


def test_many_threads_ask_at_once(loop: EngineLoop, model: Transformer) -> None:
    batch = prompts(12)
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        stream = loop.submit(batch[number], GREEDY)
        found[number] = [token for delta in stream for token in delta.token_ids]
        assert stream.output().outputs[0].token_ids == found[number]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(batch))] == ids(run(make_engine(model), batch))
    loop.wait()
    assert loop.engine.stats.free_blocks == loop.engine.stats.num_blocks
    assert loop.engine.requests == {}


def test_asyncio_reads_streams_side_by_side(loop: EngineLoop, model: Transformer) -> None:
    batch = prompts(6)

    async def read(prompt: list[int]) -> list[int]:
        stream = loop.submit(prompt, GREEDY)
        found = [token async for delta in stream for token in delta.token_ids]
        assert (await stream.result()).outputs[0].token_ids == found
        return found

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*map(read, batch)))

    assert asyncio.run(all_of_them()) == ids(run(make_engine(model), batch))


def test_closing_frees_the_blocks(loop: EngineLoop, model: Transformer) -> None:
    first, second = loop.submit([1, 2], LONG), loop.submit([3, 4], LONG)
    next(first)
    first.close()
    assert first.request_id not in loop.engine.requests
    assert [t for d in second for t in d.token_ids] == alone(model, [3, 4], LONG)
    loop.wait()
    assert loop.engine.stats.free_blocks == loop.engine.stats.num_blocks
    waiting = loop.submit(prompts(1, shortest=40)[0], LONG)
    waiting.close()
    waiting.close()
    assert list(waiting) == []
    assert not loop.engine.has_unfinished()


def test_one_that_is_refused_leaves_nothing(loop: EngineLoop) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        loop.submit_all([([1], GREEDY, None), ([], GREEDY, None)])
    with pytest.raises(RequestError, match="only_experts: found 7, allowed: numbers from 0 to 2"):
        loop.submit([1], replace(GREEDY, only_experts=[7]))
    assert not loop.running
    assert loop.engine.requests == {}


def test_a_step_that_fails_is_told_to_those_who_wait(
    loop: EngineLoop, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(loop.engine.runner, "run", fail)
        stream, other = loop.submit([1, 2], GREEDY), loop.submit([1, 2], GREEDY, deltas=False)
        with pytest.raises(MemoryError, match="no more"):
            next(stream)
        with pytest.raises(MemoryError, match="no more"):
            other.output()
        loop.wait()
    assert loop.engine.stats.free_blocks == loop.engine.stats.num_blocks
    assert loop.submit([1, 2], GREEDY).output().outputs[0].token_ids == alone(model, [1, 2], GREEDY)


def test_work_between_two_steps(loop: EngineLoop) -> None:
    stream = loop.submit([1, 2], LONG)
    next(stream)
    assert loop.call(lambda: threading.current_thread().name) == "octad engine"
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)
    assert len(stream.output().outputs[0].token_ids) == 60


def test_deltas_tell_what_was_cached(loop: EngineLoop) -> None:
    prompt = prompts(1, shortest=30, longest=30)[0]
    assert {delta.num_cached_tokens for delta in loop.submit(prompt, GREEDY)} == {0}
    assert {delta.num_cached_tokens for delta in loop.submit(prompt, GREEDY)} == {28}


def test_an_idle_engine_can_be_let_go_of(tiny_checkpoint: TinyCheckpoint) -> None:
    llm = LLM((load(tiny_checkpoint("mixtral")), byte_tokenizer()), num_blocks=40)
    llm.generate([[1, 2]], GREEDY)
    llm.loop.wait()
    held = weakref.ref(llm.engine)
    del llm
    deadline = time.monotonic() + 20
    while held() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert held() is None


def test_streams_of_a_checkpoint(tmp_path: Path, loop: EngineLoop) -> None:
    """n answers come in one stream, and it ends after the last of them."""
    found: dict[int, int] = {}
    for delta in loop.submit([1, 2], replace(GREEDY, n=3)):
        found[delta.index] = found.get(delta.index, 0) + len(delta.token_ids)
    assert found == {0: 20, 1: 20, 2: 20}


def test_a_process_ends_while_its_engine_works(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """An open stream is left behind: the thread ends with the step that runs, and the process with 0."""
    path = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "model")
    byte_tokenizer().save(path)
    code = f"""
from octad import LLM, SamplingParams
llm = LLM({str(path)!r}, dtype="float32")
stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True))
print(next(stream).index)
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")
