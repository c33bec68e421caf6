"""Weights that give no numbers: the request that meets them ends with an error, its neighbours go on."""

import pytest
import torch
from members import make_base

from octad import LLM, SamplingParams
from octad.chat.session import Session
from octad.engine.sampling import BROKEN, Sampler, SamplingState
from octad.errors import RequestError
from octad.evaluate.tasks.answers import write
from octad.fast.optimize import native_kernels
from octad.kernels.drawing import Drawing

V = 150  # not a whole number of the sampler's blocks


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model whose token for "z" has a row of NaN in its embedding."""
    torch.set_num_threads(1)
    base = make_base(
        tmp_path_factory.mktemp("broken") / "base", num_hidden_layers=1, tie_word_embeddings=False
    )
    llm = LLM(base, dtype="float32", device="cpu", num_blocks=20)
    with torch.no_grad():
        llm.model.model.embed_tokens.weight[llm.tokenizer.encode("z")] = float("nan")
    return llm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_a_row_without_numbers_leaves_its_neighbours_alone(value: float, options: dict[str, float]) -> None:
    logits = torch.full((3, V), -1e4)
    logits[:, 7] = 0.0
    logits[1] = value
    kernels = native_kernels()
    for drawing in (None, Drawing(kernels.library) if kernels else None):
        states = [SamplingState(SamplingParams(**options), [1], []) for _ in range(3)]  # type: ignore[arg-type]
        sampler = Sampler(seed=0, drawing=drawing)
        tokens = [sampled.token_id for sampled in sampler.sample(logits, states)]
        assert (tokens[0], tokens[2]) == (7, 7)
        assert [state.failure for state in states] == [None, BROKEN, None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_with_an_error(broken: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=4)
    bad, good = broken.generate(["az", "ab"], params)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].stop_reason) == ("error", BROKEN)
    assert good.outputs[0].finish_reason in ("length", "stop", "error")  # it may have said "z" itself
    with pytest.raises(RequestError, match="the answer failed: the model computes no numbers"):
        bad.check()
    with pytest.raises(RequestError, match="the answer failed"):
        write(broken, ["az"], params)


def test_a_conversation_says_it(broken: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        broken.tokenizer.config, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    session = Session(broken, SamplingParams(max_tokens=4), label="broken")
    with pytest.raises(RequestError, match="the answer failed: the model computes no numbers"):
        list(session.ask("az"))
