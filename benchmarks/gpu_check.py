"""One run on a machine with a GPU that says whether octad is right and fast there; under ten minutes, JSON at the end.

    make gpu-check                                   # writes benchmarks/results/gpu_check.json
    python benchmarks/gpu_check.py --pretended       # small, on the GPU that tests pretend: is the script itself right?

Each check stands alone: what fails is written down, with its error, and the next one begins. Weights are random and
made here. What is right: logits beside transformers', both beside float32's; greedy answers beside transformers'; a
captured step of decoding beside an eager one; the loss and the gradient's length of a training step beside transformers';
a run that is resumed beside one that was not, to the bit. What is fast: answering beside transformers (and vLLM where it
is installed), the training step beside transformers', a layer of experts beside a dense network of the same products
(goal: 0.85).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from measure import command_line, hardware, save, tell

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 540.0  # seconds, after which no check begins
LARGE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = LARGE | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256,
}  # fmt: skip


@dataclass
class Check:
    """Where a check runs: the model's directory, the device and transformers' own, and how much is done."""

    model: Path
    work: Path
    pretended: bool

    @property
    def peer(self) -> str:
        return "cpu" if self.pretended else "cuda"

    def size(self, small: int, large: int) -> int:
        return small if self.pretended else large

    def seconds(self, work: Callable[[], Any], repeat: int = 10) -> float:
        """Median seconds of a call, after one for getting ready."""
        work()
        times = []
        for _ in range(self.size(2, repeat)):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return sorted(times)[len(times) // 2]

    def tokens(self, *shape: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(0, 95, shape, generator=draw)


# ---- right ---------------------------------------------------------------------------------------------------


def logits(check: Check) -> dict[str, Any]:
    """Both in bfloat16 on the device, against float32 on the device."""
    tokens = check.tokens(2, check.size(40, 512))
    with torch.no_grad():
        ours = octad_model(check, torch.bfloat16)(tokens.to("cuda")).float().cpu()
        theirs = peer_model(check, torch.bfloat16)(tokens.to(check.peer)).logits.float().cpu()
        truth = peer_model(check, torch.float32)(tokens.to(check.peer)).logits.float().cpu()
    scale = truth.norm()
    errors = [round(float((x - truth).norm() / scale), 5) for x in (ours, theirs)]
    return {
        "octad_error": errors[0],
        "transformers_error": errors[1],
        "ok": errors[0] < 1.5 * errors[1] + 1e-3,
    }


def capture(check: Check) -> dict[str, Any]:
    """A step of decoding as a CUDA graph, replayed at the next position, beside the eager one."""
    from octad.kernels.paged import PagedBatch
    from octad.model.paged_cache import PagedCache

    engine = octad_engine(check)
    runner, size = engine.runner, engine.config.block_size
    batch = PagedBatch.of([1, 1], [5, 9], [[1, 2, 3], [4, 5, 6]], "cuda")
    rows = torch.tensor([[8, 9], [4, 8], [size + 4, 4 * size + 8]]).to("cuda")
    runner.model.model.rope.tables(64, runner.device)

    def step() -> torch.Tensor:
        cache = PagedCache(runner.pool, batch, rows[1], rows[2], runner.attention)
        return runner.model.head(runner.model.model(rows[:1], cache))

    with torch.no_grad():
        if check.pretended:
            return {"ok": bool(step().float().cpu().isfinite().all()), "graph": "none here"}
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        batch.memo.clear()
        with torch.cuda.graph(graph):
            out = step()
        rows.add_(torch.tensor([[1, 1], [1, 1], [1, 1]]).to("cuda"))
        batch.context_lens.add_(1)
        graph.replay()
        replayed, eager = out.clone(), step()
        times = [check.seconds(work) for work in (graph.replay, step)]
    return {
        "ok": torch.equal(replayed, eager),
        "graph_ms": round(1e3 * times[0], 3),
        "eager_ms": round(1e3 * times[1], 3),
    }


def resume(check: Check) -> dict[str, Any]:
    """Two steps, a state, two more: the bits of four."""
    straight = trainer(check, "straight")
    straight.fit()
    cut = trainer(check, "cut")
    for _ in range(2):
        cut.train_step()
        cut.step += 1
    cut.save()
    cut.saver.close()
    again = trainer(check, "cut")
    again.fit()
    pairs = zip(straight.optimizer.values().values(), again.optimizer.values().values(), strict=True)
    return {"ok": all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)}


def exchange(check: Check) -> dict[str, Any]:
    """NCCL over whatever devices there are: a sum, and the same through octad's World."""
    if check.pretended:
        return {"ok": True, "devices": 0}
    devices = torch.cuda.device_count()
    code = (
        "import torch, torch.distributed as d; from octad.dist import World, own_device; w = World.join();"
        " x = torch.ones(1 << 26, dtype=torch.bfloat16, device=own_device());"
        " d.all_reduce(x) if w.size > 1 else None; print(int(x[0]) == w.size, w.total(1.0) == w.size)"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    script = check.work / "exchange.py"
    script.write_text(code)
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=120, check=False)
    return {
        "ok": done.returncode == 0 and "False" not in done.stdout,
        "devices": devices,
        "said": done.stderr[-400:],
    }


# ---- fast ----------------------------------------------------------------------------------------------------


def answering(check: Check) -> dict[str, Any]:
    """Greedy answers of one user and of eight, beside transformers' of one, and vLLM's."""
    from octad.engine.params import SamplingParams

    length, new = check.size(12, 256), check.size(4, 128)
    prompts = check.tokens(8, length).tolist()
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    found: dict[str, Any] = {"ok": True}
    ours: list[int] = []
    for users in (1, 8):
        engine = octad_engine(check)

        def answer(engine: Any = engine, users: int = users) -> list[int]:
            for n, prompt in enumerate(prompts[:users]):
                engine.add_request(str(n), prompt, params)
            while engine.has_unfinished():
                engine.step()
            outputs = [engine.output(str(n)) for n in range(users)]
            return list(outputs[0].outputs[0].token_ids)

        ours = answer() if users == 1 else ours
        found[f"octad_{users}"] = round(users * new / check.seconds(answer, 3), 1)
    model = peer_model(check, torch.bfloat16)
    given = torch.tensor(prompts[:1]).to(check.peer)

    def theirs() -> list[int]:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, length:].tolist()

    alike = next((n for n, pair in enumerate(zip(ours, theirs(), strict=False)) if pair[0] != pair[1]), new)
    found |= {"transformers_1": round(new / check.seconds(theirs, 3), 1), "same_tokens": alike, "of": new}
    return found | vllm_answers(check, prompts, new)


def vllm_answers(check: Check, prompts: list[list[int]], new: int) -> dict[str, Any]:
    try:
        import vllm
    except ImportError:
        return {"vllm": "not installed"}
    if check.pretended:
        return {"vllm": "not here"}
    engine = vllm.LLM(
        str(check.model), dtype="bfloat16", gpu_memory_utilization=0.4, skip_tokenizer_init=True
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    found = {}
    for users in (1, 8):
        given = [{"prompt_token_ids": prompt} for prompt in prompts[:users]]
        found[f"vllm_{users}"] = round(
            users * new / check.seconds(lambda g=given: engine.generate(g, params), 3), 1
        )
    return found


def training(check: Check) -> dict[str, Any]:
    """A step over the same windows: loss and gradient's length, and tokens a second."""
    run = trainer(check, "step")
    begun = run.stream.state_dict()
    batch = run.stream.next(run.config.batch.windows)
    run.stream.load_state_dict(begun)  # the same windows again, for octad
    peer = peer_model(check, torch.bfloat16 if not check.pretended else torch.float32).train()
    optimizer = torch.optim.AdamW(peer.parameters(), lr=0.0)
    tokens, targets = batch.tokens.to(check.peer), batch.targets.to(check.peer)

    def theirs() -> float:
        optimizer.zero_grad()
        logits = peer(tokens).logits.flatten(0, 1)
        loss = F.cross_entropy(logits.float(), targets.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        return loss.item()

    facts, _ = run.train_step()
    loss = theirs()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in peer.parameters() if p.grad is not None]))
    count = batch.tokens.numel()
    return {
        "octad_loss": round(facts["loss"], 5),
        "transformers_loss": round(loss, 5),
        "octad_norm": round(facts["gradient_norm"], 4),
        "transformers_norm": round(norm, 4),
        "octad_tokens_per_second": round(count / check.seconds(run.train_step, 5)),
        "transformers_tokens_per_second": round(count / check.seconds(theirs, 5)),
        "ok": abs(facts["loss"] - loss) < 0.01 * loss and abs(facts["gradient_norm"] - norm) < 0.05 * norm,
    }


def experts(check: Check) -> dict[str, Any]:
    """One layer's experts against dense products of as many rows, cuBLAS's, forward and with the backward."""
    from octad.fast.grouped_experts import GroupedExperts
    from octad.model.config import ModelConfig
    from octad.model.moe import Experts

    sizes = {"hidden_size": check.size(64, 4096), "intermediate_size": check.size(96, 14336)}
    N = check.size(64, 8192)
    config = ModelConfig.from_dict(LARGE | sizes | {"model_type": "mixtral"})
    with torch.device("meta"):
        layer = GroupedExperts(Experts(config))
    with torch.device("cuda"):
        for name, parameter in list(layer.named_parameters()):
            values = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
            setattr(layer, name, torch.nn.Parameter(values))
        x = torch.randn(N, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rows = torch.randn(2 * N, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.full((N, 2), 0.5)
        chosen = torch.rand(N, 8).argsort(1)[:, :2]
    gate_up, down = (p.detach()[0].clone().requires_grad_() for p in (layer.gate_up_proj, layer.down_proj))

    def dense() -> torch.Tensor:
        gate, up = F.linear(rows, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def mixture() -> torch.Tensor:
        return layer(x, weights, chosen)

    found: dict[str, Any] = {}
    for name, backward in (("forward", False), ("both", True)):
        times = [check.seconds(lambda w=w, b=backward: run_one(w, b)) for w in (mixture, dense)]
        found |= {f"{name}_ms": round(1e3 * times[0], 3), f"{name}_of_dense": round(times[1] / times[0], 3)}
    return found | {"ok": check.pretended or min(found["forward_of_dense"], found["both_of_dense"]) >= 0.85}


def run_one(work: Callable[[], torch.Tensor], backward: bool) -> None:
    with nullcontext() if backward else torch.no_grad():
        y = work()
        if backward:
            y.backward(torch.ones_like(y))


# ---- models --------------------------------------------------------------------------------------------------


def make_model(work: Path, shape: dict[str, Any]) -> Path:
    """A random Mixtral in bfloat16 with a tokenizer of single characters, and text to train on."""
    import transformers
    from small import character_tokenizer, jsonl, texts

    torch.manual_seed(0)
    config = transformers.MixtralConfig(**shape, torch_dtype="bfloat16")
    transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(work / "model")
    character_tokenizer().save(work / "model")
    jsonl(work / "text.jsonl", texts(4000 if shape is LARGE else 60))
    return work / "model"


def octad_model(check: Check, dtype: torch.dtype) -> Any:
    from octad.checkpoint.load import open_source
    from octad.fast.loading import open_fast

    return open_fast(open_source(check.model), dtype, "cuda")[0]


def octad_engine(check: Check) -> Any:
    from octad.checkpoint.load import load_tokenizer, open_source
    from octad.engine.engine import Engine, EngineConfig
    from octad.fast.loading import open_fast

    source = open_source(check.model)
    model, attention = open_fast(source, torch.bfloat16, "cuda")
    return Engine(model, load_tokenizer(source), EngineConfig(kv_cache_gb=check.size(1, 4)), attention)


def peer_model(check: Check, dtype: torch.dtype) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(check.model, dtype=dtype).to(check.peer).eval()


def trainer(check: Check, name: str) -> Any:
    """Everything learns; documents are not told apart, as transformers does not either."""
    from octad.train.learner import tune_learner
    from octad.train.run_config import load_config
    from octad.train.trainer import Trainer

    window = check.size(32, 1024)
    source = {"name": "text", "data": str(check.work / "text.jsonl")}
    settings = {
        "task": "tune", "model": str(check.model), "mode": "all", "steps": 4, "device": "cuda", "compile": False,
        "dtype": "float32" if check.pretended else "bfloat16", "batch": {"windows": 4, "micro": 4},
        "optimizer": {"lr": 1e-4}, "schedule": {"warmup": 1}, "save": {"every": 99},
        "data": {"window": window, "cache": str(check.work / "cache"), "document_mask": False, "sources": [source]},
    }  # fmt: skip
    file = check.work / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return Trainer(tune_learner(load_config(file)), check.work / name)


CHECKS = (logits, capture, answering, experts, training, resume, exchange)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretended", action="store_true", help="small, on the GPU that the tests pretend")
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.json"
    )
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    if given.pretended:
        import pretended_gpu

        if why := pretended_gpu.cannot():
            parser.error(why)
        pretended_gpu.install()
        place: Any = pretended_gpu.PretendedGPU()
    elif torch.cuda.is_available():
        place = nullcontext()
    else:
        parser.error("PyTorch sees no GPU here; --pretended tries the script itself")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_model(work, SMALL if given.pretended else LARGE)
        with place:
            results = carry_out(Check(model, work, given.pretended))
    device = "pretended" if given.pretended else torch.cuda.get_device_name()
    about = {"command": command_line(), "gpu": device, "hardware": hardware()}
    save(given.output, about | {"checks": results})
    failed = [name for name, found in results.items() if not found.get("ok")]
    print(
        json.dumps(
            {"gpu": device, "failed": failed, "seconds": round(sum(r["seconds"] for r in results.values()))}
        )
    )
    return 1 if failed else 0


def carry_out(check: Check) -> dict[str, dict[str, Any]]:
    begun, results = time.monotonic(), dict[str, dict[str, Any]]()
    for work in CHECKS:
        started = time.monotonic()
        if started - begun > LIMIT:
            found: dict[str, Any] = {"ok": False, "error": "no time left"}
        else:
            try:
                found = work(check)
            except Exception:
                found = {"ok": False, "error": traceback.format_exc()[-1500:]}
        results[work.__name__] = found | {"seconds": round(time.monotonic() - started, 1)}
        tell(f"{work.__name__}: {json.dumps(results[work.__name__])}")
        torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    sys.exit(main())
