"""The engine on the pretended GPU: what it answers there is what it answers on the CPU."""

from typing import Any

import cases
import torch
from cases import case
from pretended_gpu import PretendedGPU
from tiny import byte_tokenizer, prompts, run

from octad.checkpoint.load import open_source
from octad.engine.engine import Engine, EngineConfig
from octad.engine.outputs import RequestOutput
from octad.engine.params import SamplingParams, StructuredOutput
from octad.fast.loading import open_fast

SETTINGS = {"block_size": 4, "num_blocks": 128}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BATCH = prompts(3, longest=20)


def engine(family: str, device: str, **how: Any) -> Engine:
    model, attention = open_fast(
        open_source(cases.MODELS[family]), how.pop("dtype", torch.float32), device, native=False, **how
    )
    return Engine(model, byte_tokenizer(model.config.vocab_size), EngineConfig(**SETTINGS), attention)


def told(outputs: list[RequestOutput]) -> list[Any]:
    return [[(a.token_ids, a.text, a.finish_reason) for a in output.outputs] for output in outputs]


def compare(family: str, params: Any = GREEDY, **how: Any) -> PretendedGPU:
    want = told(run(engine(family, "cpu", **how), BATCH, params))
    with PretendedGPU() as gpu:
        got = told(run(engine(family, "cuda", **how), BATCH, params))
    assert got == want
    return gpu


@case
def every_family_answers_as_on_the_cpu() -> None:
    for family in cases.MODELS:
        compare(family)


@case
def rounded_weights_answer_as_on_the_cpu() -> None:
    for name in ("int8", "int4"):
        compare("mixtral", quantize=name)


@case
def sampling_grammar_and_penalties_answer_as_on_the_cpu() -> None:
    plain = {"max_tokens": 6, "ignore_eos": True, "seed": 5}
    every = [
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, n=2, **plain),
        SamplingParams(temperature=1.1, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.3, **plain),
        SamplingParams(temperature=0, logprobs=3, logit_bias={3: 5.0}, min_tokens=2, **plain),
    ]
    compare("mixtral", every)
    compare(
        "mixtral",
        SamplingParams(temperature=0, max_tokens=8, structured=StructuredOutput(regex="[a-c]{2,5}")),
    )


@case
def single_experts_work() -> None:
    compare("mixtral", SamplingParams(temperature=0, max_tokens=5, only_experts=(1,)))
    compare("olmoe", SamplingParams(temperature=0, max_tokens=5, only_experts=(0, 2)))
