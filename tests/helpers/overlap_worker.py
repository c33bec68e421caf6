"""Takes steps with and without overlap in the processes that torchrun starts: overlap_worker.py tune.yaml out/

Every rank writes into out/told.RANK, as JSON: a digest of the weights after some steps of each way, and of the first
way in which order buckets were sent and backward passes ended."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from octad.train import reducer
from octad.train.learner import tune_learner
from octad.train.run_config import load_config
from octad.train.trainer import Trainer

STEPS = 3


def taken(file: Path, run: Path, overlap: bool) -> tuple[str, list[str]]:
    """The weights that STEPS steps make, and the order of what happened in them."""
    trainer = Trainer(tune_learner(load_config(file)), run)
    events: list[str] = []
    listening, send = reducer.Reducer.listening, reducer.Bucket.send
    backward = torch.Tensor.backward

    def told(bucket: reducer.Bucket, gradients: list[torch.Tensor]) -> None:
        events.append("sent")
        send(bucket, gradients)

    def passed(tensor: torch.Tensor, *given: Any) -> None:
        backward(tensor, *given)
        events.append("passed")

    patches = (
        mock.patch.object(reducer.Reducer, "listening", lambda self, last: listening(self, last and overlap)),
        mock.patch.object(reducer.Bucket, "send", told),
        mock.patch.object(torch.Tensor, "backward", passed),
    )
    with patches[0], patches[1], patches[2]:
        for _ in range(STEPS):
            trainer.train_step()
            trainer.step += 1
    digest = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        digest.update(
            name.encode() + parameter.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest(), events


def main(file: Path, out: Path) -> None:
    torch.set_num_threads(1)
    reducer.BUCKET = 4096
    ways = {name: taken(file, out / name, name == "overlapped") for name in ("overlapped", "after")}
    (out / f"told.{os.environ['RANK']}").write_text(json.dumps(ways))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
