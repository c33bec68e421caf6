"""The engine on the pretended GPU: what it answers there is what it answers on the CPU."""

import logging
from typing import Any
from unittest import mock

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
from octad.kernels.paged import PagedBatch, paged_attention_reference
from octad.kernels.varlen import varlen_paged
from octad.model.paged_cache import PagedCache

SETTINGS = {"block_size": 4, "num_blocks": 128}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
BATCH = prompts(3, longest=20)


def engine(family: str, device: str, **how: Any) -> Engine:
    """On the CPU by PyTorch alone, as it is on the GPU, whatever is asked there."""
    dtype, native = how.pop("dtype", torch.float32), device == "cuda"
    model, attention = open_fast(open_source(cases.MODELS[family]), dtype, device, native=native, **how)
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
        with mock.patch.object(logging.getLogger("octad"), "warning") as log:
            gpu = compare("mixtral", quantize=name)
        (line,) = [call.args[0] for call in log.call_args_list if "on a GPU" in call.args[0]]
        assert line.startswith(f"{name} on a GPU only saves memory")
        assert f"octad export MODEL --to compressed-tensors --quantize {name}" in line  # what is quick there
        assert any(
            where.startswith("model/moe.py") for _, where in gpu.in_layers()
        )  # as the log line says: slow


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


@case
def attention_over_pages_equals_its_twin() -> None:
    """In one call, through what stands for CUDA's kernels: gathered, and in their blocks."""
    torch.manual_seed(0)
    queries, contexts = [1, 1, 5, 3], [9, 4, 5, 11]
    tables = [[7, 1, 4], [0], [2, 9], [3, 5, 8]]
    keys, values = (torch.randn(12, 4, 2, 8).bfloat16() for _ in range(2))
    q = torch.randn(sum(queries), 4, 8).bfloat16()
    for window in (None, 3):
        batch = PagedBatch.of(queries, contexts, tables)
        want = paged_attention_reference(q, keys, values, batch, window)
        for blocks in (False, True):
            with (
                PretendedGPU(),
                mock.patch("octad.kernels.varlen.reads_blocks", lambda device, on=blocks: on),
            ):
                batch = PagedBatch.of(queries, contexts, tables, "cuda")
                got = varlen_paged(*(x.to("cuda") for x in (q, keys, values)), batch, window).cpu()
            assert torch.equal(got, want)


@case
def the_host_waits_for_nothing_in_a_layer() -> None:
    """Prompts and single tokens of mixed lengths, in bfloat16: nothing asked of the device, nothing sent to it."""
    with PretendedGPU() as gpu:
        run(engine("mixtral", "cuda", dtype=torch.bfloat16), BATCH, GREEDY)
        run(engine("qwen2_moe", "cuda", dtype=torch.bfloat16), BATCH, GREEDY)
    assert gpu.launches
    assert gpu.in_layers() == []


@case
def a_step_of_decoding_can_be_captured() -> None:
    """What the model launches for one new token a sequence is the same from step to step, shape by shape, and needs
    nothing of the host: what a CUDA graph asks for."""
    steps = []
    with PretendedGPU() as gpu:
        runner = engine("mixtral", "cuda", dtype=torch.bfloat16).runner
        for contexts in ([5, 9], [6, 10]):
            batch = PagedBatch.of([1, 1], contexts, [[1, 2, 3], [4, 5, 6]], "cuda")
            places = torch.tensor([[8, 9], [c - 1 for c in contexts], [0, 1]]).to("cuda")
            cache = PagedCache(runner.pool, batch, places[1], places[2], runner.attention)
            runner.model.model.rope.tables(16, runner.device)
            gpu.forget()
            with torch.no_grad():
                runner.model.head(runner.model.model(places[:1], cache))
            assert not gpu.waits
            assert not gpu.uploads
            steps.append(list(gpu.launches))
    assert steps[0] == steps[1]


@case
def steps_of_decoding_are_recorded_and_repeated() -> None:
    """Sequences that begin and end at different times: the same answers as launched one by one, most of the steps by a
    graph; what the host does in them is to send three arrays, and to read what came of it."""
    every = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=1) for n in (9, 14, 5)]
    for family in ("mixtral", "llama"):
        with PretendedGPU() as gpu:
            told_by = []
            for graphs in (True, False):
                model = engine(family, "cuda", dtype=torch.bfloat16)
                if not graphs:
                    model.runner.graphs = None
                told_by.append(told(run(model, BATCH, every)))
                if graphs:
                    assert model.runner.graphs is not None
                    assert model.runner.graphs.replays >= 5
                    gpu.forget()
                    run(model, BATCH[:1], GREEDY)
                    run(model, BATCH[:1], GREEDY)
                    assert gpu.in_layers() == []
        assert told_by[0] == told_by[1]


@case
def what_cannot_be_recorded_is_launched_one_by_one() -> None:
    """Weights in float32, rounded ones, and experts that some sequences may not use."""
    with PretendedGPU():
        assert engine("mixtral", "cuda").runner.graphs is None
        assert engine("mixtral", "cuda", dtype=torch.bfloat16, quantize="int8").runner.graphs is None
        barred = engine("mixtral", "cuda", dtype=torch.bfloat16)
        run(barred, BATCH, SamplingParams(temperature=0, max_tokens=5, only_experts=(1,)))
        assert barred.runner.graphs is not None
        assert barred.runner.graphs.replays == 0
        with mock.patch("torch.cuda.graph", side_effect=RuntimeError("no graphs here")):
            off = engine("mixtral", "cuda", dtype=torch.bfloat16)
            run(off, BATCH, GREEDY)
        assert off.runner.graphs is not None
        assert off.runner.graphs.replays == 0
