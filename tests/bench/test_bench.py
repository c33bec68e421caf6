"""octad bench: what a token costs against counts by hand and by torch, medians, turns, reasons; never a wall clock."""

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer
from tiny_models import TinyCheckpoint, TinyModel

from octad import machine as limits
from octad.bench import bench
from octad.bench import cases as bench_plan
from octad.bench.cases import BenchOptions, Cell, Entry, Texts, packaged_texts
from octad.bench.measures import figures, nearest, ratio, spread, summary
from octad.bench.peers import LlamaBench, Unmeasured, Worker, find_llama_bench
from octad.bench.results_table import render
from octad.bench.traffic import WeightBytes, covered
from octad.bench.worker import OctadRunner, answer_room, counting, make_variant, serve
from octad.checkpoint.load import load_model, open_source
from octad.cli.main import main as cli
from octad.errors import OctadError, RequestError
from octad.kernels.packed import pack
from octad.machine import Limits
from octad.model import cost
from octad.model.moe import FixedRouter
from octad.model.transformer import Transformer

CPU = torch.device("cpu")
# what llama-bench of llama.cpp prints, shortened to the keys that matter
LLAMA = {
    "build_commit": "0c1e570",
    "build_number": 1,
    "model_type": "llama ?B Q8_0",
    "model_size": 735798528,
    "model_n_params": 692036928,
    "n_threads": 1,
    "avg_ts": 40.0,
}


@pytest.fixture(scope="module")
def mixture(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture with a tokenizer, long enough a context for a few cells."""
    made = tiny_checkpoint("mixtral", max_position_embeddings=256)
    path = tmp_path_factory.mktemp("bench") / "mixture"
    shutil.copytree(made, path)
    byte_tokenizer().core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return path


# ---- what a token costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_weight_bytes(family: str, tiny_model: TinyModel, tiny_checkpoint: TinyCheckpoint) -> None:
    theirs = {name: p.numel() for name, p in tiny_model(family).named_parameters()}
    tied = "lm_head.weight" not in theirs
    experts = sum(n for name, n in theirs.items() if ".mlp.experts." in name)
    found = WeightBytes.of(load_model(open_source(tiny_checkpoint(family)), torch.bfloat16))
    assert found.experts == 2 * experts
    assert found.idle == (0 if tied else 2 * theirs["model.embed_tokens.weight"])
    assert found.total == 2 * sum(theirs.values())
    if experts:  # three experts, two a token
        assert found.step(2) == pytest.approx(found.always + 2 * experts * 2 / 3)
    else:
        assert found.step(0) == found.always


def test_weight_bytes_of_packed_weights_count_values_and_scales_once() -> None:
    whole = pack(torch.randn(96, 128), bits=8, group=64)

    class PackedLinear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = (replace(whole, panels=whole.panels[i::2], outputs=48) for i in (0, 1))
            self._both = [whole]  # the same memory

    model: Any = torch.nn.Module()
    model.lm_head, model.config = None, type("Config", (), {"num_experts": 0})()
    model.proj = PackedLinear()
    assert WeightBytes.of(model).total == 96 * 128 + 96 * 2 * 2  # a byte a value, two bytes a group's scale


def test_covered_bytes_of_overlapping_extents() -> None:
    draw = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 60, (12,), generator=draw).tolist()
    extents = [(s, s + int(torch.randint(0, 15, (), generator=draw))) for s in starts]
    assert covered(extents) == len({byte for first, last in extents for byte in range(first, last)})


def test_counting_sees_each_steps_different_experts(mixture: Path) -> None:
    model = load_model(open_source(mixture), torch.float32)
    tokens = torch.arange(12).view(1, -1)
    with counting(model) as used, torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate = FixedRouter([0, 2])
        model(tokens)
    assert used == []  # the routers that were there when it began
    with counting(model) as used, torch.no_grad():
        model(tokens)
    assert used == [2, 2]


# ---- the price of a mixture --------------------------------------------------------------------------------------


def alone(path: Path) -> tuple[Transformer, Transformer]:
    """The dense member, and the mixture with every token sent to expert 0 with weight 1."""
    source = open_source(path)
    mixed = load_model(source, torch.float32)
    for layer in mixed.model.layers:
        layer.mlp.gate = FixedRouter([0])
    return make_variant(source, "dense", CPU).float(), mixed


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_dense_member_is_the_mixture_with_one_expert(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octad.bench.worker.compute_dtype", lambda device: torch.float32)
    dense, mixed = alone(tiny_checkpoint(family))
    tokens = torch.randint(0, 96, (2, 11))
    torch.testing.assert_close(dense(tokens), mixed(tokens))
    assert not [name for name, _ in dense.named_parameters() if "experts" in name or ".gate." in name]


def test_dense_member_needs_layers_of_one_width(tiny_checkpoint: TinyCheckpoint) -> None:
    source = open_source(tiny_checkpoint("qwen3_moe"))  # its first layer is dense, and wider than an expert
    with pytest.raises(OctadError, match="differ in width"):
        make_variant(source, "dense", CPU)
    assert bench_plan.price_variants(source.config) == ["top-1"]


def test_top_1_is_transformers_with_one_expert_a_token(
    tiny_checkpoint: TinyCheckpoint, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octad.bench.worker.compute_dtype", lambda device: torch.float32)
    model = make_variant(open_source(tiny_checkpoint("mixtral")), "top-1", CPU)
    tokens = torch.randint(0, 96, (1, 9))
    theirs = tiny_model("mixtral", num_experts_per_tok=1)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-4)


# ---- the machine -------------------------------------------------------------------------------------------------


def test_limits_are_the_best_of_all_probes() -> None:
    found = Limits(CPU, read_bytes=1 << 16, side=16)
    found.probe(2)
    found.probe(1)
    report = found.report()
    assert len(report["read_bytes_per_s"]["all"]) == 3
    assert found.bandwidth() == max(report["read_bytes_per_s"]["all"])
    assert found.peak("bfloat16") == report["matmul_flops_per_s"]["bfloat16"]["best"]
    assert found.peak("float16") is None


def test_hardware_and_memory() -> None:
    found = limits.hardware(CPU)
    assert found["threads"] == torch.get_num_threads()
    assert found["memory_bytes"] > (limits.available_memory() or 0) > 0
    held = torch.ones(16 << 20)
    memory = limits.memory_of()
    assert memory["peak"] >= memory["resident"] > held.nbytes
    assert limits.memory_of(2**22 + 1) == {}  # above the highest process number


# ---- figures -----------------------------------------------------------------------------------------------------


def test_spread_keeps_every_repeat() -> None:
    values = [3.0, 1.0, 10.0, 2.0]
    assert spread(values) == {"median": 2.5, "min": 1.0, "max": 10.0, "all": values}


class Fake:
    """A contestant that takes the time it is told to, and notes when it was asked."""

    system = "octad"

    def __init__(self, name: str, log: list[str], trouble: str | None = None) -> None:
        self.name, self.log, self.trouble = name, log, trouble
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        if self.trouble == "start":
            raise Unmeasured("it is not installed")

    def warm_up(self, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
        self.log.append(f"warm {self.name}")
        return {"distinct_experts": 2.5}

    def prefill(self, prompt: Sequence[int]) -> dict[str, Any]:
        self.log.append(f"{self.name} reads {len(prompt)}")
        return {"seconds": 0.5, "ttft": 0.5}

    def decode(self, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
        if self.trouble == "decode":
            raise Unmeasured("its process ended")
        self.log.append(f"{self.name} writes {len(prompts)}")
        lengths = [len(p) + steps / 2 for p in prompts]
        tokens = steps * len(prompts)
        return {"seconds": 0.25, "tokens": tokens, "ttft": [0.1] * len(prompts), "lengths": lengths}

    def memory(self) -> dict[str, int]:
        return {"resident": 5, "peak": 7}

    def close(self) -> None:
        self.log.append(f"{self.name} closes")


def rounds(options: BenchOptions, entries: list[Entry]) -> bench.Rounds:
    texts = Texts({"one": range(100), "two": range(100, 200)}, "numbers")
    found = Limits(CPU, read_bytes=1 << 12, side=8)
    return bench.Rounds(options, texts, found, lambda what, share: None, entries)


def options(**changes: Any) -> BenchOptions:
    plain = {
        "prompt_lengths": (8,),
        "contexts": (4,),
        "batch_sizes": (1, 3),
        "decode_tokens": 10,
        "repeat": 2,
    }
    return BenchOptions(**({"model": "somewhere"} | plain | changes))


def test_contestants_take_turns_and_the_next_one_begins_each_turn(mixture: Path) -> None:
    config, log = open_source(mixture).config, list[str]()
    entries = [Entry(Fake(name, log), config, "model") for name in "ABC"]
    rounds(options(batch_sizes=(1,), repeat=3), entries).measure(entries)
    reads = [line[0] for line in log if line.endswith("reads 8")]
    assert "".join(reads) == "ABC" + "ABC" + "BCA" + "CAB"  # warm-ups first
    writes = [line for line in log if "w" in line]
    assert writes[:3] == ["warm A", "warm B", "warm C"]
    assert "".join(line[0] for line in writes[3:]) == "ABC" + "BCA" + "CAB"
    assert log[-3:] == ["A closes", "B closes", "C closes"]


def test_who_fails_is_reported_and_the_others_go_on(mixture: Path) -> None:
    config, log = open_source(mixture).config, list[str]()
    troubles = (None, "start", "decode")
    entries = [Entry(Fake(f"with {t}", log, t), config, "peer") for t in troubles]
    run = rounds(options(), entries)
    run.measure(entries)
    assert run.done == run.total  # the bar reaches its end whoever falls out
    well, absent, broken = (bench.report(e, options(), run.limits) for e in entries)
    assert all(c["tokens_per_s"]["median"] for c in well["cells"])
    assert absent["failed"] == "it is not installed"
    assert [c["tokens_per_s"] for c in absent["cells"]] == [
        {"median": None, "reason": "it is not installed"}
    ] * 3
    assert [c["tokens_per_s"]["median"] for c in broken["cells"]] == [16, None, None]
    assert broken["cells"][2]["tokens_per_s"]["reason"] == "its process ended"


def test_figures_by_hand(mixture: Path) -> None:
    config = open_source(mixture).config
    entry = Entry(Fake("A", []), config, "model", dtype="bfloat16")
    parts = {"always": 1000, "experts": 3000, "idle": 77, "num_experts": 3}
    entry.contestant.facts = {"weight_bytes": 4077, "weight_bytes_by_use": parts}
    machine = Limits(CPU)
    machine.read, machine.matmul["bfloat16"] = [50.0, 1e6, 7.0], [1e9, 2e9]
    read, one, three = Cell("prefill", 8, 1), Cell("decode", 4, 1), Cell("decode", 4, 3)
    entry.found[read] = [{"seconds": s, "ttft": s} for s in (0.5, 0.1, 0.2)]
    entry.found[one] = [
        {"seconds": 0.5, "tokens": 10, "ttft": [0.1], "lengths": [9.0], "read_bytes_per_s": 1e5}
    ]
    entry.found[three] = [
        {"seconds": 0.6, "tokens": 30, "ttft": [0.1, 0.4, 0.2], "lengths": [9.0, 10.0, 11.0]}
    ]
    entry.warm[three] = {"distinct_experts": 2.5}
    found = figures(entry, read, machine)
    assert found["tokens_per_s"]["median"] == pytest.approx(8 / 0.2)
    assert found["ttft_s"] == {"median": 0.2, "min": 0.1, "max": 0.5, "all": [0.5, 0.1, 0.2]}
    assert found["mfu"] == pytest.approx(cost.prefill_flops(config, 8) / 0.2 / 2e9)
    found = figures(entry, one, machine)
    row = 2 * 2 * (2 * 8) * 2  # layers, keys and values, two heads of eight, bfloat16
    assert found["mbu"] == pytest.approx((1000 + 2000 + 9 * row) * 20 / 1e6)
    assert found["mbu_now"]["all"] == pytest.approx([(1000 + 2000 + 9 * row) * 20 / 1e5])
    found = figures(entry, three, machine)
    assert found["tokens_per_s"]["median"] == pytest.approx(50)
    assert found["tpot_s"]["median"] == pytest.approx(0.06)
    assert found["ttft_s"]["median"] == 0.2
    assert found["weight_bytes_per_step"] == 1000 + 2500
    assert found["mbu"] == pytest.approx((3500 + 30 * row) * (50 / 3) / 1e6)


def contestant(name: str, role: str, one: float | None, **more: Any) -> dict[str, Any]:
    cells = [{"measure": "decode", "length": 4, "users": 1, "tokens_per_s": {"median": one}}]
    cells.append({"measure": "decode", "length": 4, "users": 16, "tokens_per_s": {"median": 8 * (one or 0)}})
    plain = {"quantize": "int8", "variant": None, "experts_per_token": 2, "facts": {}}
    return {"name": name, "role": role, "cells": cells} | plain | more


def test_summary_ratios() -> None:
    found = summary(
        [
            contestant("octad", "model", 30.0, variant="as made"),
            contestant("octad top-1", "price", 45.0, variant="top-1"),
            contestant("octad dense", "price", 50.0, variant="dense"),
            contestant("transformers", "peer", 12.0),
            contestant("absent", "peer", None),
        ],
        context=4,
    )
    assert found["decode_over_peers"] == {"octad": {"transformers": 2.5, "absent": None}}
    assert found["price"] == {"int8": {"top-2": 0.6, "top-1": 0.9}}
    assert found["batch_over_one"]["octad"]["4"] == {"1": 1.0, "16": 8.0}
    assert ratio(1.0, None) is None


def test_fewer_bits_that_are_slower_are_told() -> None:
    speeds = {"bf16": ("none", 30.0), "int8": ("int8", 29.5), "int4": ("int4", 20.0)}
    mine = [contestant(name, "model", s, quantize=q, variant="as made") for name, (q, s) in speeds.items()]
    found = summary(mine[::-1], context=4)["slower_with_fewer_bits"]
    assert found == [
        f"int4 is slower than int8 at writing behind 4 tokens, {users}: 0.68 of its speed"
        for users in ("1 user", "16 users")
    ]
    assert summary(mine[:2], context=4)["slower_with_fewer_bits"] == []


def test_the_peer_beside_which_a_quantisation_stands_has_weights_of_like_size() -> None:
    def gguf(name: str, bits: float) -> dict[str, Any]:
        return contestant(name, "peer", 1.0, facts={"weight_bytes": bits * 100, "parameters": 800})

    files = [gguf("BF16", 16.0), gguf("Q8_0", 8.5), gguf("Q4_0", 4.7)]
    for quantization, name in (("none", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_0")):
        found = nearest(contestant("octad", "model", 1.0, quantize=quantization), files)
        assert found is not None
        assert found["name"] == name


def test_contestants_are_loaded_together_only_where_they_fit(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(mixture)
    entries, _ = bench_plan.line_up(options(model=str(mixture), peers=("transformers",)), source, CPU)
    for free, together in ((1e6, False), (1e12, True), (None, True)):
        monkeypatch.setattr(bench_plan, "available_memory", lambda free=free: free)
        assert bench_plan.fit_together(entries, CPU) is together
    by_variant = {e.variant: bench_plan.memory_needed(e) for e in entries}
    assert by_variant["dense"] < by_variant["as made"]  # one expert of three


def test_those_of_like_precision_take_turns_where_not_all_fit(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(mixture)
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    small.write_bytes(bytes(cost.parameters(source.config)))
    large.write_bytes(bytes(2 * cost.parameters(source.config)))
    monkeypatch.setattr(bench_plan, "find_llama_bench", lambda given: "llama-bench")
    files = {"peers": ("transformers",), "gguf": (small, large)}
    asked = options(model=str(mixture), quantize=("none", "int8"), **files)
    entries, _ = bench_plan.line_up(asked, source, CPU)
    everything = sum(bench_plan.memory_needed(e) for e in entries if isinstance(e.contestant, Worker))
    sizes = {}
    for part in (10.0, 1.0, 0.1):
        monkeypatch.setattr(bench_plan, "available_memory", lambda part=part: int(part * everything))
        found = bench_plan.groups(entries, source.config, CPU)
        assert [e for group in found for e in group] == entries or part == 1.0
        sizes[part] = [sorted(e.contestant.name for e in group) for group in found]
    assert [len(group) for group in sizes[10.0]] == [len(entries)]
    assert all(len(group) == 1 for group in sizes[0.1])
    plain, rounded = sizes[1.0]
    assert {"octad bf16", "octad bf16 dense", "transformers bf16", "llama.cpp large"} <= {
        name.replace("fp32", "bf16") for name in plain
    }
    assert {"octad int8", "octad int8 dense", "llama.cpp small"} <= set(rounded)


def test_shares_are_taken_of_the_probes_of_the_contestants_own_time(mixture: Path) -> None:
    config = open_source(mixture).config
    entries = [Entry(Fake(name, []), config, "model", dtype="bfloat16") for name in "AB"]
    run = rounds(options(batch_sizes=(1,)), entries)
    for entry in entries:
        run.measure([entry])
    first, second = entries
    assert 0 == first.probes.start < first.probes.stop == second.probes.start < second.probes.stop
    told = bench.report(second, options(), run.limits)["limits"]
    assert told["read_bytes_per_s"] == max(run.limits.read[second.probes])
    assert told["matmul_flops_per_s"] == max(run.limits.matmul["bfloat16"][second.probes])


# ---- text --------------------------------------------------------------------------------------------------------


def test_prompts_are_different_stretches_of_neighbouring_domains() -> None:
    texts = Texts({"a": range(40), "b": range(100, 140)}, "numbers")
    first = texts.prompts(users=4, length=10, turn=0)
    assert [p[0] for p in first] == [0, 100, 10, 110]
    assert [p[0] for p in texts.prompts(users=2, length=10, turn=1)] == [100, 10]
    assert texts.repeats(users=4, length=10, turns=5) == []
    assert texts.repeats(users=4, length=11, turns=5) == ["a", "b"]
    assert texts.prompts(1, 45, 0)[0][38:45] == [38, 39, 0, 1, 2, 3, 4]


def test_packaged_text_is_of_eight_domains() -> None:
    tokenizer = byte_tokenizer()
    texts = packaged_texts(tokenizer)
    assert len(texts.ids) == 8
    assert all(len(ids) > 10_000 for ids in texts.ids.values())
    assert "def" in tokenizer.decode(texts.ids["python"][:2000])


# ---- contestants -------------------------------------------------------------------------------------------------


def test_octad_runner_counts_what_was_generated(mixture: Path) -> None:
    runner = OctadRunner(str(mixture), variant="as made", quantize=None, device="cpu", longest=100, users=3)
    prompts = [[5, 6, 7] * 9, [9] * 27, [20, 30] * 13 + [1]]
    found = runner.decode(prompts, 6, warm=True)
    assert found["tokens"] == 18
    assert len(found["ttft"]) == 3
    assert all(length >= 27 + 1 + 3 for length in found["lengths"])
    assert 1 <= found["distinct_experts"] <= 3
    assert not runner.engine.has_unfinished()
    again = runner.decode(prompts[:1], 6, warm=False)
    assert again["tokens"] == 6
    assert again["distinct_experts"] is None
    assert runner.prefill(prompts[0])["ttft"] > 0
    assert not runner.engine.has_unfinished()
    assert runner.engine.stats.prefix_hit_tokens == 0  # a prompt that was read before is read again
    assert runner.facts()["kv_cache_bytes"] == sum(
        pool.nbytes
        for pools in (runner.engine.runner.pool.keys, runner.engine.runner.pool.values)
        for pool in pools
    )


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_weight_bytes_of_the_quantised_engine(mixture: Path, quantize: str, bits: int) -> None:
    runner = OctadRunner(str(mixture), variant="as made", quantize=quantize, device="cpu", longest=9, users=1)
    parts = runner.facts()["weight_bytes_by_use"]

    # D 32, F 48: outputs are multiples of 16; inputs are padded to whole groups, scales to pairs of them, two bytes each
    def row(inputs: int, bits: int) -> int:
        group = {8: 64, 4: 32}[bits]
        return -(-inputs // group) * group * bits // 8 + 2 * 2

    assert parts["experts"] == 2 * 3 * (2 * 48 * row(32, bits) + 32 * row(48, 8))  # down has 8 bits in both
    embeddings = 96 * 32 * runner.model.model.embed_tokens.weight.element_size()
    assert parts["idle"] == embeddings  # the head has packed weights of its own
    tokens = runner.decode([[1, 2, 3]] * 1, 4, warm=True)
    assert tokens["distinct_experts"] == 2


def test_answer_room_is_enough_for_the_last_prompt_to_be_read() -> None:
    assert answer_room([[0] * 100], 8) == 10
    assert answer_room([[0] * 1024] * 3, 8) == 10 + 2 * 3


def test_a_worker_in_its_own_process_and_what_it_says_when_it_cannot(mixture: Path) -> None:
    settings = {"system": "octad", "model": str(mixture), "variant": "as made", "quantize": None}
    settings |= {"device": "cpu", "longest": 60, "users": 1}
    with Worker("octad", settings, threads=1) as worker:
        assert worker.facts["weight_bytes"] > 0
        assert worker.decode([[1, 2, 3]], 4)["tokens"] == 4
        with pytest.raises(Unmeasured, match="prompt is empty"):
            worker.prefill([])
        assert worker.prefill([1, 2])["seconds"] > 0  # an error does not end it
        assert worker.memory()["peak"] > 0
        assert worker.process is not None
        worker.process.kill()
        with pytest.raises(Unmeasured, match="status -9"):
            worker.prefill([1, 2])


def test_serve_answers_a_failed_start_with_the_reason(tmp_path: Path) -> None:
    settings = {"system": "octad", "model": str(tmp_path), "variant": "as made", "quantize": None}
    answers = list(serve(settings | {"device": "cpu", "longest": 9, "users": 1}, iter(["{}"])))
    assert len(answers) == 1
    assert str(tmp_path) in answers[0]["error"]


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., LlamaBench]:
    """llama("body of a script") -> LlamaBench with that script as its program."""

    def make(body: str) -> LlamaBench:
        program, file = tmp_path / "llama-bench", tmp_path / "tiny.gguf"
        program.write_text(f"#!{sys.executable}\nimport json, sys\n{body}\n")
        program.chmod(0o755)
        file.write_bytes(b"GGUF")
        return LlamaBench(find_llama_bench(str(program)), file, threads=2)

    return make


def test_llama_bench_is_asked_for_the_same_lengths(llama: Callable[..., LlamaBench], tmp_path: Path) -> None:
    log = tmp_path / "calls"
    peer = llama(
        f"open({str(log)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\nprint(json.dumps([{LLAMA!r}]))"
    )
    peer.start()
    assert peer.name == "llama.cpp Q8_0"
    assert 8 * peer.facts["weight_bytes"] / peer.facts["parameters"] == pytest.approx(8.51, abs=0.01)
    assert peer.prefill([1] * 80)["seconds"] == 2.0
    assert peer.decode([[1] * 30], 20) == {"seconds": 0.5, "tokens": 20, "ttft": [], "lengths": [40.0]}
    with pytest.raises(Unmeasured, match="one sequence"):
        peer.decode([[1], [2]], 20)
    _, read, write = log.read_text().splitlines()
    assert "-p 80 -n 0 -d 0 -t 2" in read
    assert "-p 0 -n 20 -d 30 -t 2" in write


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('no such flag', file=sys.stderr); sys.exit(3)", "status 3: no such flag"),
        ("print('hello')", "was not understood"),
        ("print('[]')", "was not understood"),
        ("print('[{\"avg_ts\": 0.0}]')", "was not understood"),
    ],
)
def test_llama_bench_that_fails(llama: Callable[..., LlamaBench], body: str, reason: str) -> None:
    with pytest.raises(Unmeasured, match=reason):
        llama(body).start()


def test_llama_bench_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unmeasured, match="no such program"):
        find_llama_bench(str(tmp_path / "nothing"))
    with pytest.raises(Unmeasured, match="no such file"):
        LlamaBench(sys.executable, tmp_path / "none.gguf", 1).start()


# ---- the whole ---------------------------------------------------------------------------------------------------


class Local(Worker):
    """A worker without its process: the same conversation, in this one."""

    def start(self) -> None:
        self.lines: list[str] = []
        self.answers = serve(self.settings, self._requests())
        self.facts = self._next("facts")

    def _requests(self) -> Iterator[str]:
        while self.lines:
            yield self.lines.pop()

    def _call(self, call: str, **arguments: Any) -> dict[str, Any]:
        self.lines.append(json.dumps({"call": call} | arguments))
        return self._next("found")

    def _next(self, key: str) -> dict[str, Any]:
        answer = json.loads(json.dumps(next(self.answers)))
        if "error" in answer:
            raise Unmeasured(answer["error"])
        return dict(answer[key])

    def close(self) -> None:
        self.log.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers in this process, one thread, limits of a moment."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(bench_plan, "Worker", Local)
    monkeypatch.setattr(limits, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(limits, "SIDE", 32)
    yield
    torch.set_num_threads(before)


def octad(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["octad", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli()
    return int(stop.value.code or 0)


SMALL = ("--prompt-lengths", "8,32", "--contexts", "16,40", "--batch-sizes", "2", "--decode-tokens", 4)


@pytest.mark.usefixtures("here")
def test_bench_of_a_mixture_beside_transformers(
    mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = ("--peer", "transformers", "--peer", "llama.cpp", "--repeat", 3)
    assert octad(monkeypatch, "bench", mixture, *SMALL, *peers) == 0
    printed = capsys.readouterr().out
    results = json.loads(printed.splitlines()[-1])
    by_name = {c["name"].replace("fp32", "bf16"): c for c in results["contestants"]}
    assert list(by_name) == ["octad bf16", "octad bf16 top-1", "octad bf16 dense", "transformers bf16"]
    cells = [(c["measure"], c["length"], c["users"]) for c in by_name["transformers bf16"]["cells"]]
    reads, writes = [("prefill", 8, 1), ("prefill", 32, 1)], [(n, u) for n in (16, 40) for u in (1, 2)]
    assert cells == reads + [("decode", *cell) for cell in writes]
    assert len(by_name["octad bf16 dense"]["cells"]) == 3  # both prompts, one user behind the first context
    for contestant in results["contestants"]:
        assert contestant["failed"] is None
        for cell in contestant["cells"]:
            found = cell["tokens_per_s"]
            assert "reason" not in found, found
            assert len(found["all"]) == 3
            assert found["median"] == statistics.median(found["all"])
            assert found["min"] <= found["median"] <= found["max"]
    mine, theirs = by_name["octad bf16"], by_name["transformers bf16"]
    one = mine["cells"][2]["tokens_per_s"]["median"] / theirs["cells"][2]["tokens_per_s"]["median"]
    assert results["summary"]["decode_over_peers"][mine["name"]]["transformers bf16"] == round(one, 3)
    parts = mine["facts"]["weight_bytes_by_use"]
    assert mine["memory_bytes"]["weights"] == parts["always"] + parts["experts"] + parts["idle"]
    assert theirs["memory_bytes"]["weights"] == results["model"]["parameters"] * 2
    assert results["command"].startswith("octad bench mixture --prompt-lengths 8,32")
    assert any(note.startswith("llama.cpp: not measured: ") for note in results["notes"])
    assert str(mixture.parent) not in json.dumps(results)
    assert "reading a prompt" in printed
    assert "dense member" in printed


@pytest.mark.usefixtures("here")
def test_bench_of_a_dense_model_on_the_users_text_as_json(
    tiny_checkpoint: TinyCheckpoint,
    mixture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, text = tmp_path / "dense", tmp_path / "mine.txt"
    shutil.copytree(tiny_checkpoint("llama"), path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(mixture / name, path)
    text.write_text("It is a truth universally acknowledged. " * 9)
    assert octad(monkeypatch, "bench", path, *SMALL, "--repeat", 1, "--text", text, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert [c["variant"] for c in results["contestants"]] == ["as made"]
    assert results["settings"]["text"] == "the text of mine.txt"
    assert results["summary"]["price"] == {}
    assert list(render(results))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peer", "vllm"), "--peer vllm: not known; give one of transformers, llama.cpp"),
        (("--quantize", "int3"), "--quantize int3: not known"),
        (("--contexts", "12,many"), "--contexts: give whole numbers"),
        (("--batch-sizes", "0"), "--batch-sizes: give whole numbers above 0"),
        (("--batch-sizes", "4097"), "--batch-sizes: found a number of 4 digits; give 4,096 at most"),
        (("--contexts", "9" * 27), "--contexts: found a number of 27 digits; give 100,000,000 at most"),
        (("--contexts", "256"), "the model's context is 256; give shorter ones"),
        (("--prompt-lengths", "300"), "--prompt-lengths: 301 positions are needed"),
        (("--device", "abacus"), "--device abacus"),
        (("--text", "/nowhere/text"), "/nowhere/text"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    mixture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = {"--prompt-lengths": "8", "--contexts": "16", "--batch-sizes": "1"} | {arguments[0]: arguments[1]}
    words = [word for pair in plain.items() for word in pair]
    assert octad(monkeypatch, "bench", mixture, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_peer_that_is_not_installed_is_refused_first(
    mixture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured for minutes."""
    monkeypatch.setattr("octad.bench.cases.find_spec", lambda name: None)
    words = ["--peer", "transformers", "--prompt-lengths", "8", "--contexts", "16", "--batch-sizes", "1"]
    assert octad(monkeypatch, "bench", mixture, *words) == 2
    assert "pip install transformers" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_nothing_measured_is_an_error_with_the_reason(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Local) -> None:
        raise Unmeasured("no memory left")

    monkeypatch.setattr(Local, "start", refuse)
    with pytest.raises(OctadError, match="nothing could be measured: no memory left"):
        bench.run(replace(options(), model=str(mixture)))


def test_lists_that_are_empty_are_refused() -> None:
    with pytest.raises(RequestError, match="--quantize"):
        options(quantize=())
    with pytest.raises(RequestError, match="at least 1"):
        options(repeat=0)
