"""The Python front door: text in, text out, streams, chats and experts."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_generation import generate
from tiny import byte_tokenizer, load
from tiny_models import TinyCheckpoint

from octad import LLM, SamplingParams
from octad.engine.opened import DTYPES
from octad.errors import CheckpointError, DataError, OctadError, RequestError
from octad.evaluate.contestants import Member, contestant
from octad.fast.optimize import native_kernels

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% endfor %}{% if loud %}LOUD{% endif %}a:"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of three with a tokenizer, a chat template and octad's own names."""
    path = tmp_path_factory.mktemp("llm") / "mixture"
    shutil.copytree(tiny_checkpoint("mixtral", num_hidden_layers=3), path)
    tokenizer = byte_tokenizer()
    tokenizer.config["chat_template"] = TEMPLATE
    tokenizer.save(path)
    names = [{"name": name} for name in ("base", "french", "maths")]
    (path / "octad.json").write_text(json.dumps({"experts": names}))
    return path


@pytest.fixture
def llm(directory: Path) -> LLM:
    return LLM(directory, dtype="float32", device="cpu", block_size=4, num_blocks=200)


def plain(llm: LLM, text: str, tokens: int = 12) -> list[int]:
    ids = llm.tokenizer.encode(text, add_special_tokens=True, parse_special=False)
    return [token.id for token in generate(llm.model, ids, max_tokens=tokens)]


def test_answers_come_in_order(llm: LLM) -> None:
    texts = ["one", "a longer one", "x"]
    outputs = llm.generate(texts, GREEDY)
    assert [o.prompt for o in outputs] == texts
    assert [o.outputs[0].token_ids for o in outputs] == [plain(llm, text) for text in texts]
    for output in outputs:
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
        assert output.finished
    assert pickle.loads(pickle.dumps(outputs)) == outputs


def test_one_text_ids_and_params_for_each(llm: LLM) -> None:
    assert llm.generate("one", GREEDY)[0].outputs[0].token_ids == plain(llm, "one")
    assert llm.generate([[5, 6], [7]], GREEDY)[1].prompt_token_ids == [7]
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 5)]
    assert [len(o.outputs[0].token_ids) for o in llm.generate(["a", "b"], each)] == [2, 5]
    with pytest.raises(RequestError, match="found 2 for 3 prompts"):
        llm.generate(["a", "b", "c"], each)
    with pytest.raises(RequestError, match="give a list of prompts"):
        llm.generate([1, 2, 3], GREEDY)  # type: ignore[list-item]
    assert llm.generate([], GREEDY) == []


def test_the_spelling_of_a_control_token_is_text(llm: LLM) -> None:
    assert 95 not in llm.generate("<|end|>", GREEDY)[0].prompt_token_ids


def test_a_prompt_that_cannot_be_leaves_nothing_behind(llm: LLM) -> None:
    for prompts in (["fine", ""], ["fine", "x" * 500]):
        with pytest.raises(RequestError, match=r"prompt is empty|has 500 tokens, the context 128"):
            llm.generate(prompts, GREEDY)
        assert not llm.engine.has_unfinished()
        assert llm.engine.requests == {}


def test_a_stream_is_the_answer(llm: LLM) -> None:
    expected = llm.generate("stream", GREEDY)[0].outputs[0]
    deltas = list(llm.stream("stream", GREEDY))
    assert "".join(d.text for d in deltas) == expected.text
    assert [t for d in deltas for t in d.token_ids] == expected.token_ids
    assert [d.finish_reason for d in deltas][-2:] == [None, "length"]
    assert llm.engine.requests == {}


def test_streams_side_by_side_and_closing_one(llm: LLM) -> None:
    first, second = llm.stream("first", GREEDY), llm.stream("second", GREEDY)
    begun = [next(first), next(second)]
    generated = llm.generate("third", GREEDY)[0].outputs[0].token_ids
    first.close()  # type: ignore[attr-defined]
    rest = [*begun[1].token_ids, *(t for d in second for t in d.token_ids)]
    assert rest == plain(llm, "second")
    assert generated == plain(llm, "third")
    assert llm.engine.requests == {}
    assert llm.engine.stats.free_blocks == llm.engine.stats.num_blocks


def test_several_answers_in_a_stream(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=5, n=3, max_tokens=6, ignore_eos=True)
    expected = llm.generate("many", params)[0].outputs
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for delta in llm.stream("many", params):
        found[delta.index] += delta.token_ids
    assert list(found.values()) == [answer.token_ids for answer in expected]


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi<|end|>"}]
    output = llm.chat(messages, GREEDY)
    assert llm.tokenizer.decode(output.prompt_token_ids, False) == "s:Su:Hi<|end|>a:"
    assert 95 not in output.prompt_token_ids
    assert llm.tokenizer.decode(llm.chat(messages, GREEDY, loud=True).prompt_token_ids).endswith("LOUDa:")
    streamed = [t for d in llm.stream_chat(messages, GREEDY) for t in d.token_ids]
    assert streamed == output.outputs[0].token_ids
    with pytest.raises(DataError):
        llm.chat([{"content": "no role"}], GREEDY)


def test_a_conversation_without_a_message(llm: LLM) -> None:
    for ask in (llm.chat, llm.stream_chat):
        with pytest.raises(RequestError, match="conversation is empty"):
            ask([])


def test_only_one_expert(llm: LLM, directory: Path) -> None:
    """Forced through the engine = the model forced by evaluate, and the prefix cache does not remember others."""
    text, traced = "a text of several blocks", SamplingParams(**vars(GREEDY) | {"routed_experts": True})
    free = llm.generate(text, GREEDY)[0]
    reference = load(directory)
    answers = []
    for number, name in enumerate(llm.expert_names):
        llm.only(name if number else 0)
        forced = llm.generate(text, GREEDY)[0]
        assert forced.num_cached_tokens == 0
        with contestant(reference, Member(number)):
            ids = llm.tokenizer.encode(text)
            assert forced.outputs[0].token_ids == [t.id for t in generate(reference, ids, max_tokens=12)]
        speakers = llm.generate(text, traced)[0].outputs[0].speakers
        assert speakers == [number] * 12
        answers.append(forced.outputs[0].token_ids)
    assert len({tuple(a) for a in answers}) == 3
    llm.only(None)
    again = llm.generate(text, GREEDY)[0]
    assert again.outputs[0].token_ids == free.outputs[0].token_ids
    assert (
        again.num_cached_tokens == len(again.prompt_token_ids) // 4 * 4 - 4
    )  # what it read before is still there


def test_experts_that_cannot_be(llm: LLM, tiny_checkpoint: TinyCheckpoint) -> None:
    for wrong in ("german", 3, -1):
        with pytest.raises(RequestError, match="there are base, french, maths"):
            llm.only(wrong)
    dense = LLM((load(tiny_checkpoint("llama")), byte_tokenizer()), num_blocks=20)
    assert dense.expert_names == []
    with pytest.raises(RequestError, match="is dense"):
        dense.only(0)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_is_given_once(quantize: str | None, tiny_checkpoint: TinyCheckpoint) -> None:
    """Its weights are gone where the kernels have them; the first one goes on."""
    first = LLM((load(tiny_checkpoint("mixtral")), byte_tokenizer()), num_blocks=20)
    before = first.generate("abc", GREEDY)[0].outputs[0].token_ids
    if native_kernels() is not None:
        with pytest.raises(RequestError, match="runs on octad's kernels already"):
            LLM((first.model, first.tokenizer), quantize=quantize, num_blocks=20)
    assert first.generate("abc", GREEDY)[0].outputs[0].token_ids == before


def test_names_of_experts(directory: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "copy"))
    (other / "octad.json").write_text('{"experts": [{"name": "one"}]}')
    with pytest.raises(CheckpointError, match="names 1 experts, the weights have 3"):
        LLM(other, num_blocks=20)
    (other / "octad.json").write_text("[]")
    with pytest.raises(CheckpointError, match="should hold one JSON object, found list"):
        LLM(other, num_blocks=20)
    (other / "octad.json").unlink()
    assert LLM(other, num_blocks=20).expert_names == ["expert 0", "expert 1", "expert 2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, directory: Path) -> None:
    llm = LLM(directory, dtype=dtype, device="cpu", native=False, num_blocks=20)
    assert {p.dtype for p in llm.model.parameters()} == {DTYPES[dtype]}
    assert llm.engine.runner.pool.keys[0].dtype == DTYPES[dtype]
    assert len(llm.generate("abc", GREEDY)[0].outputs[0].token_ids) == 12


def test_settings_that_cannot_be(directory: Path) -> None:
    with pytest.raises(RequestError, match="dtype: found 'int3'"):
        LLM(directory, dtype="int3")
    with pytest.raises(RequestError, match="device: found 'abacus'"):
        LLM(directory, device="abacus")
    with pytest.raises(OctadError, match="max_num_seqs: found 0"):
        LLM(directory, max_num_seqs=0)
    with pytest.raises(CheckpointError):
        LLM("no/such/model/here")


def test_generation_config_is_not_applied(directory: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(directory, tmp_path / "copy"))
    settings = {"temperature": 0.1, "repetition_penalty": 3.0, "max_new_tokens": 2, "eos_token_id": 95}
    (other / "generation_config.json").write_text(json.dumps(settings))
    llm = LLM(other, dtype="float32", num_blocks=100)
    assert llm.generate("abc", GREEDY)[0].outputs[0].token_ids == plain(llm, "abc")


def test_importing_octad_is_light() -> None:
    code = "import octad, sys; assert not {'torch', 'numpy', 'octad.engine'} & set(sys.modules); octad.SamplingParams"
    subprocess.run([sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], check=True)
