"""Trains several files one after another in the processes that torchrun starts: rank_worker.py a.yaml a/ b.yaml b/

Every rank writes into memory.RANK how many bytes of weights, masters and moments it holds at the end of a run, and into
begun.RANK how many bytes of weights it read at its beginning, and a digest of the whole model that this made."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.spans import read_rows
from octad.fast import weights
from octad.fast.pieces import local, whole
from octad.train.learner import tune_learner
from octad.train.pretrain import pretrain_learner
from octad.train.run_config import TuneConfig, load_config
from octad.train.trainer import Trainer


def held(trainer: Trainer) -> int:
    tensors = [local(p.detach()) for p in trainer.model.parameters()]
    tensors += [local(t) for t in trainer.optimizer.state_tensors().values()]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


def begun(trainer: Trainer, read: list[int]) -> str:
    digest = hashlib.sha256()
    wrapped = trainer.layout.pieces(dict(trainer.model.named_parameters()))
    for name, parameter in trainer.model.named_parameters():
        mine = local(parameter.detach())
        value = whole(wrapped[name].wrap(mine)) if name in wrapped else mine
        digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{sum(read)} {digest.hexdigest()}"


def counted(read: list[int]) -> Any:
    """read_rows, which also tells how many bytes."""

    def count(*given: Any) -> torch.Tensor:
        rows = read_rows(*given)
        read.append(rows.nbytes)
        return rows

    return count


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    for file, run in zip(arguments[::2], arguments[1::2], strict=True):
        config = load_config(file)
        learner = tune_learner(config) if isinstance(config, TuneConfig) else pretrain_learner(config)
        read: list[int] = []
        weights.read_rows = counted(read)
        trainer = Trainer(learner, Path(run), lambda line: print(line, flush=True))
        told = begun(trainer, read) if trainer.step == 0 else ""
        outcome = trainer.fit()
        (Path(run) / f"begun.{os.environ.get('RANK', '0')}").write_text(told)
        (Path(run) / f"memory.{os.environ.get('RANK', '0')}").write_text(str(held(trainer)))
        sys.stdout.write(
            f"{outcome.value}\n"
        )  # at once: print's newline would come after another rank's word
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
