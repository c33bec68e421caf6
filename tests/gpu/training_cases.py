"""Training on the pretended GPU: the steps are those of the CPU, within rounding."""

import json
from pathlib import Path
from typing import Any

import cases
import torch
from cases import case
from pretended_gpu import PretendedGPU
from safetensors.torch import load_file
from small import tune_file

from octad.fast.document_attention import DocumentAttention
from octad.model.config import ModelConfig
from octad.train.learner import tune_learner
from octad.train.run_config import load_config
from octad.train.trainer import Trainer

ROUTING = {"balance": 0.01, "z": 0.001, "bias": 1e-3}


def trainer(name: str, device: str, **changes: Any) -> Trainer:
    settings = {
        "steps": 2,
        "log_every": 1,
        "device": device,
        "optimizer": {"lr": 0.01},
        "routing": ROUTING,
        "evaluate": {"domains": {"one": "one.jsonl"}, "tokens": 64, "window": 32},
        "compile": False,
    }
    file = tune_file(cases.WORK, cases.MODELS["mixtral"], **settings | changes)
    return Trainer(tune_learner(load_config(file)), cases.WORK / f"{name}-{device}")


def tuned(name: str, device: str, **changes: Any) -> Path:
    made = trainer(name, device, **changes)
    made.fit()
    return made.run


def losses(run: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines() if "loss" in line
    ]


def compare(name: str, **changes: Any) -> PretendedGPU:
    want = tuned(name, "cpu", **changes)
    with PretendedGPU() as gpu:
        got = tuned(name, "cuda", **changes)
    torch.testing.assert_close(losses(got), losses(want), rtol=2e-4, atol=1e-4)
    for key, value in load_file(want / "model.safetensors").items():
        torch.testing.assert_close(load_file(got / "model.safetensors")[key], value, rtol=0, atol=2e-3)
    return gpu


@case
def routers_learn_as_on_the_cpu() -> None:
    compare("router", mode="router")


@case
def repair_learns_as_on_the_cpu() -> None:
    compare("repair", mode="repair")


@case
def everything_learns_as_on_the_cpu() -> None:
    """And the host waits for nothing within a layer, on the way there or back."""
    batch = {"windows": 4, "micro": 2, "checkpointing": True}
    gpu = compare("all", mode="all", batch=batch, routing=ROUTING | {"capacity": 1.0})
    assert gpu.in_layers() == [], gpu.in_layers()
    places = {where for _, where, _ in gpu.waits}
    assert not [
        p for p in places if p == "?" or p.startswith(("model/", "fast/", "kernels/", "train/routers"))
    ]


@case
def documents_of_many_lengths_are_one_call() -> None:
    """With the gradients that each document alone has on the CPU."""
    config = ModelConfig.from_dict(json.loads((cases.MODELS["mixtral"] / "config.json").read_text()))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    torch.manual_seed(0)
    given = [torch.randn(2, 8, heads, 8).bfloat16() for heads in (4, 2, 2)]
    seed = torch.randn(2, 8, 4, 8).bfloat16()

    def found(device: str) -> list[torch.Tensor]:
        leaves = [x.to(device).requires_grad_() for x in given]
        y = DocumentAttention(config, documents, device).attend(0, *leaves)
        return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, leaves, seed.to(device)))]

    want = found("cpu")
    with PretendedGPU() as gpu:
        got = found("cuda")
    assert sum("varlen_attn.default" in name for name, _ in gpu.launches) == 1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@case
def muon_learns_as_on_the_cpu() -> None:
    compare("muon", mode="all", optimizer={"name": "muon", "lr": 0.01})


@case
def a_run_resumes_to_the_same_bits() -> None:
    noisy = {
        "steps": 3,
        "mode": "all",
        "routing": ROUTING | {"jitter": 0.1, "sample": True},
        "save": {"every": 9},
    }
    with PretendedGPU():
        straight = tuned("straight", "cuda", **noisy)
        cut = trainer("cut", "cuda", **noisy)
        for _ in range(2):
            cut.train_step()
            cut.step += 1
        cut.save()
        again = tuned("cut", "cuda", **noisy)
    for key, value in load_file(straight / "model.safetensors").items():
        assert torch.equal(load_file(again / "model.safetensors")[key], value), key


@case
def a_recomputed_block_keeps_its_routing() -> None:
    """One choice a layer and micro-batch, whether blocks are computed again or not."""
    counts = []
    with PretendedGPU() as gpu:
        for name, again in (("kept", False), ("again", True)):
            batch = {"windows": 4, "micro": 2, "checkpointing": again}
            run = trainer(name, "cuda", mode="all", batch=batch)
            gpu.forget()
            run.train_step()
            names = [launch for launch, _ in gpu.launches]
            counts.append(
                [names.count(f"aten.{op}") for op in ("topk.default", "sort.stable", "silu.default")]
            )
    layers, micros = 2, 2
    assert [count[0] for count in counts] == [layers * micros] * 2
    assert counts[0][1] == counts[1][1]  # of the choices
    assert counts[1][2] > counts[0][2]  # and the rest is computed again
