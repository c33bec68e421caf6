"""One contestant of a benchmark in a process of its own: clean memory, its own threads, nobody else's allocations.

    python -m octad.bench.worker '{"system": "octad", "model": "mixture/", "quantize": "int8", ...}'

Answers one line of JSON for each line of JSON on stdin, after a first line that describes what was loaded:
{"call": "prefill", "prompt": [ids]} and {"call": "decode", "prompts": [[ids], ...], "steps": n, "warm": bool}.
All that libraries print goes to stderr. peers.py is the other end.

Timing: ids are given, so tokenising is not counted; sampling is greedy, the end token does not end an answer, and every
token's id reaches Python, as it must for streaming.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from octad.bench.traffic import WeightBytes
from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.checkpoint.source import TensorSource
from octad.checkpoint.views import ExpertView
from octad.dist import compute_dtype, spare_the_collector
from octad.engine.engine import EngineConfig
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.errors import OctadError
from octad.machine import memory_of, synchronise
from octad.model import cost
from octad.model.observe import mixtures, watching
from octad.model.transformer import Transformer

Ids = list[int]
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class Runner(Protocol):
    """What a contestant can do. Times are seconds."""

    def facts(self) -> dict[str, Any]:
        """dtype, bytes of weights and whatever else identifies it."""

    def prefill(self, prompt: Ids) -> dict[str, Any]:
        """`seconds` to read a prompt, `ttft` until its first answer token is known (None where not measured)."""

    def decode(self, prompts: list[Ids], steps: int, warm: bool) -> dict[str, Any]:
        """`seconds` and `tokens` while all answers grow, `ttft` of each, `lengths` of the sequences half-way."""


# ---- octad -------------------------------------------------------------------------------------------------------


class OctadRunner:
    """The engine as a user has it: LLM, continuous batching, paged cache."""

    def __init__(
        self,
        model: str,
        *,
        variant: str,
        quantize: str | None,
        device: str,
        longest: int,
        users: int,
        memory: str | None = None,
    ) -> None:
        source = open_source(model, quantised=True)
        given: Any = model
        if variant != "as made":
            given = (make_variant(source, variant, torch.device(device)), load_tokenizer(source))
        block = 16
        blocks = users * (math.ceil(longest / block) + 1)
        sizes: dict[str, Any] = {"block_size": block, "num_blocks": blocks, "max_num_seqs": users}
        self.llm = LLM(given, device=device, quantize=quantize, memory=memory, **sizes)
        self.engine, self.count = self.llm.engine, 0
        self.model: Transformer = self.llm.model
        itemsize = self.model.model.norm.weight.element_size()
        self.cache_bytes = blocks * block * cost.kv_bytes_per_token(self.model.config, itemsize)

    def facts(self) -> dict[str, Any]:
        """The weights in place, by how decoding reads them."""
        weights = WeightBytes.of(self.model)
        parts = {"always": weights.always, "experts": weights.experts, "idle": weights.idle}
        return {
            "dtype": NAMES[self.model.model.norm.weight.dtype],
            "weight_bytes": weights.total,
            "weight_bytes_by_use": parts | {"num_experts": weights.num_experts},
            "kv_cache_bytes": self.cache_bytes,
        }

    def prefill(self, prompt: Ids) -> dict[str, Any]:
        """The time to the first token is the time of the prompt: the engine samples in the same step."""
        self.engine.reset_prefix_cache()
        begun = time.perf_counter()
        name = self._add(prompt, 1)
        while not any(d.token_ids for d in self.engine.step()):
            pass
        seconds = time.perf_counter() - begun
        while self.engine.has_unfinished():
            self.engine.step()
        self.engine.output(name)
        return {"seconds": seconds, "ttft": seconds}

    def decode(self, prompts: list[Ids], steps: int, warm: bool) -> dict[str, Any]:
        """All prompts at once; timed from the moment when each has its first token, for `steps` steps.

        While warming up it counts how many different experts a step of this batch uses (the hooks cost time)."""
        self.engine.reset_prefix_cache()
        preempted, begun = self.engine.stats.preemptions, time.perf_counter()
        names = [self._add(p, answer_room(prompts, steps)) for p in prompts]
        made, first = dict.fromkeys(names, 0), dict[str, float]()
        while len(first) < len(names):
            for name, tokens in self._step():
                made[name] += tokens
                if tokens:
                    first.setdefault(name, time.perf_counter() - begun)
        lengths = [len(p) + made[n] + steps / 2 for p, n in zip(prompts, names, strict=True)]
        if store := self.llm.expert_store:
            store.reset()
        with counting(self.model) if warm else nullcontext(list[int]()) as used:
            begun = time.perf_counter()
            tokens = sum(count for _ in range(steps) for _, count in self._step())
            seconds = time.perf_counter() - begun
        for name in names:
            self.engine.abort(name)
        if self.engine.stats.preemptions > preempted:
            raise OctadError("the key/value cache was too small: sequences were preempted")
        if tokens != steps * len(prompts):
            raise OctadError(f"{tokens} tokens came of {len(prompts)} answers in {steps} steps")
        found = {"seconds": seconds, "tokens": tokens, "ttft": list(first.values()), "lengths": lengths}
        found |= {"expert_store": store.stats.report() if store else None}
        return found | {"distinct_experts": sum(used) / len(used) if used else None}

    def _step(self) -> list[tuple[str, int]]:
        return [(d.request_id, len(d.token_ids)) for d in self.engine.step()]

    def _add(self, prompt: Ids, max_tokens: int) -> str:
        self.count += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add_request(str(self.count), prompt, params)
        return str(self.count)


def answer_room(prompts: Sequence[Sequence[int]], steps: int) -> int:
    """Tokens that the first answer may reach before the last one's `steps` are done, while the engine reads the other
    prompts chunk by chunk."""
    chunk = EngineConfig().max_num_batched_tokens
    return steps + 2 + sum(math.ceil(len(p) / chunk) + 1 for p in prompts[1:])


@contextmanager
def counting(model: Transformer) -> Iterator[list[int]]:
    """The number of different experts of each routed layer and step inside the block."""
    used: list[int] = []

    def hear(layer: int, gate: Any, x_ND: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        used.append(torch.unique(experts).numel())

    with watching(model, hear):
        yield used


# ---- variants ------------------------------------------------------------------------------------------------------


def make_variant(source: TensorSource, variant: str, device: torch.device) -> Transformer:
    """The price of being a mixture: "dense", expert 0 as the only feed-forward network, with no router and no path of
    experts at all, a model of the size that a token costs at top-1; or "top-K", the mixture with K experts a token."""
    dtype = compute_dtype(device)
    if variant == "dense":
        return load_model(ExpertView(source, 0), dtype, device)
    model, k = load_model(source, dtype, device), int(variant.removeprefix("top-"))
    for mlp in mixtures(model).values():
        mlp.gate.top_k = k
    model.config = replace(model.config, num_experts_per_tok=k)
    return model


# ---- transformers ------------------------------------------------------------------------------------------------


class Clock:
    """A streamer for generate(): notes when each token's id arrives."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.moments: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        """Called with the prompt, then with the ids of each step."""
        self.moments.append(time.perf_counter() - self.begun)

    def end(self) -> None:
        """Called when the answer is complete."""


class TransformersRunner:
    """AutoModelForCausalLM as its documentation uses it: bfloat16, generate() with its own cache, greedy."""

    def __init__(self, model: str, *, device: str) -> None:
        import transformers

        path = Path(model)
        place = {"gguf_file": path.name} if path.is_file() else {}
        self.device = torch.device(device)
        made: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent if place else path, dtype=torch.bfloat16, **place
        )
        self.model: Any = made.eval().to(self.device)
        self.version = transformers.__version__

    def facts(self) -> dict[str, Any]:
        """The version, and which of its attention and expert paths it chose."""
        config = self.model.config
        tensors = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        return {
            "version": self.version,
            "dtype": NAMES[self.model.dtype],
            "weight_bytes": sum(tensors.values()),
            "attention": getattr(config, "_attn_implementation", None),
            "experts": getattr(config, "_experts_implementation", None),
        }

    def prefill(self, prompt: Ids) -> dict[str, Any]:
        """A forward pass of the prompt that fills the cache, logits of the last position only, as generate() does."""
        ids = torch.tensor([prompt], device=self.device)
        synchronise(self.device)
        begun = time.perf_counter()
        with torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1)
        synchronise(self.device)
        return {"seconds": time.perf_counter() - begun, "ttft": None}

    def decode(self, prompts: list[Ids], steps: int, warm: bool) -> dict[str, Any]:
        """The prompts as one batch of equal lengths; timed between the first token and the last of `steps` more."""
        ids, clock = torch.tensor(prompts, device=self.device), Clock()
        length = {"min_new_tokens": steps + 1, "max_new_tokens": steps + 1}
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **length,
        )
        first, last = clock.moments[1], clock.moments[-1]
        if len(clock.moments) != steps + 2:
            raise OctadError(f"generate() made {len(clock.moments) - 1} tokens, asked for {steps + 1}")
        lengths = [len(p) + 1 + steps / 2 for p in prompts]
        found = {"seconds": last - first, "tokens": steps * len(prompts), "lengths": lengths}
        return found | {"ttft": [first] * len(prompts), "distinct_experts": None}


# ---- the process -------------------------------------------------------------------------------------------------


def make_runner(system: str, **settings: Any) -> Runner:
    """The contestant that the first argument describes."""
    return OctadRunner(**settings) if system == "octad" else TransformersRunner(**settings)


def reason(error: BaseException) -> str:
    """An error as one line; those that are not meant for users with their kind."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OctadError) and text else f"{type(error).__name__}: {text}"[:300]


def device_memory() -> dict[str, int]:
    """Bytes that this process holds on the GPU, where it uses one."""
    return {"device": torch.cuda.memory_allocated()} if torch.cuda.is_available() else {}


def serve(settings: Mapping[str, Any], lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What to answer, line by line; an error is an answer."""
    try:
        runner = make_runner(**settings)
        spare_the_collector()
        yield {"facts": runner.facts() | {"memory_loaded": memory_of() | device_memory()}}
    except Exception as error:
        yield {"error": reason(error)}
        return
    for line in lines:
        try:
            request = json.loads(line)
            yield {"found": getattr(runner, request.pop("call"))(**request)}
        except Exception as error:
            yield {"error": reason(error)}


def main() -> None:
    """Answers go where stdout went; stdout itself becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for answer in serve(json.loads(sys.argv[1]), iter(sys.stdin)):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
