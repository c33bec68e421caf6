"""Trains several files one after another in the processes that torchrun starts: rank_worker.py a.yaml a/ b.yaml b/

At the end of each run, every rank writes how many bytes of weights, masters and moments it holds into memory.RANK."""

import os
import sys
from pathlib import Path

import torch

from octad.train.learner import tune_learner
from octad.train.pieces import local
from octad.train.pretrain import pretrain_learner
from octad.train.run_config import TuneConfig, load_config
from octad.train.trainer import Trainer


def held(trainer: Trainer) -> int:
    tensors = [local(p.detach()) for p in trainer.model.parameters()]
    tensors += [local(t) for t in trainer.optimizer.state_tensors().values()]
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    for file, run in zip(arguments[::2], arguments[1::2], strict=True):
        config = load_config(file)
        learner = tune_learner(config) if isinstance(config, TuneConfig) else pretrain_learner(config)
        trainer = Trainer(learner, Path(run), lambda line: print(line, flush=True))
        outcome = trainer.fit()
        (Path(run) / f"memory.{os.environ.get('RANK', '0')}").write_text(str(held(trainer)))
        sys.stdout.write(
            f"{outcome.value}\n"
        )  # at once: print's newline would come after another rank's word
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
