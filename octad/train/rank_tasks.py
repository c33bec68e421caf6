"""A specialist that is larger than one GPU, on a Ray cluster: the processes of Ray Train's TorchTrainer train it
together.

    outcome, why = train_over(config, specialist, "specialists", here=os.getcwd(), gpus=1.0, board=board)

The coordinator is a task of fanout.py like any other; it asks for no CPU, the processes do. They are to octad what
torchrun's are: `parallel` says how weights lie. A process that is lost takes the others down, and Ray Train starts
all anew, which go on from the last state. They ask the board after each step whether they are to stop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octad.errors import OctadError
from octad.train.branch import train_specialist
from octad.train.run_config import BranchConfig, SpecialistSpec
from octad.train.signals import Throttle


def train_over(
    config: BranchConfig, specialist: SpecialistSpec, output: str, here: str, gpus: float, board: Any
) -> tuple[str, str]:
    """Train one specialist by `ray.processes` processes: how it ended, and why it failed where it did."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.chdir(here)
    storage = (
        Path(output).resolve() / f".ray-{specialist.name}"
    )  # Ray Train's own; octad's states are in the run
    asked = {"config": config, "specialist": specialist, "output": output, "here": here, "board": board}
    trainer = TorchTrainer(
        _rank,
        train_loop_config=asked,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.ray.processes,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": config.ray.cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=specialist.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.retries),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray Train's own kinds, by version
        return "failed", f"its processes were lost ({' '.join(str(error).split())[:200]})"
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    ended: tuple[str, str] = ray.get(board.ended.remote(specialist.name))
    return ended


def _rank(asked: dict[str, Any]) -> None:
    """One process."""
    import ray

    config, specialist, board = asked["config"], asked["specialist"], asked["board"]
    os.chdir(asked["here"])  # so that relative paths mean what they do for the user
    torch.set_num_threads(max(1, int(config.ray.cpus)))
    leads = os.environ["RANK"] == "0"

    def nothing(*told: Any) -> None:
        pass

    show: Callable[..., Any] = Throttle(board.show.remote) if leads else nothing
    tell: Callable[[str], Any] = board.tell.remote if leads else nothing

    def stops() -> bool:
        return leads and bool(ray.get(board.stops.remote()))

    try:
        outcome = train_specialist(config, specialist, Path(asked["output"]), tell, show, stops)
        ended = (outcome.value, "")
    except OctadError as error:
        ended = ("failed", str(error))
    if leads:
        ray.get(board.end.remote(specialist.name, ended))
