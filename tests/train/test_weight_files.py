"""What training leaves in a directory: no engine's pattern for weights finds anything but the result's weights."""

from pathlib import Path

import pytest
import yaml
from small import checkpoint, jsonl, texts, tune_file
from weight_files import taken_for_weights, tensors_found

from octad.checkpoint.load import open_source
from octad.checkpoint.names import tensor_plan
from octad.train.branch import branch
from octad.train.learner import tune_learner
from octad.train.run_config import load_branch, load_config
from octad.train.trainer import Outcome, Trainer


def test_a_tuned_mixture(tiny_checkpoint, tmp_path: Path) -> None:
    mixture = checkpoint(tiny_checkpoint("mixtral", num_local_experts=4), tmp_path / "mixture")
    run = tmp_path / "tuned"
    assert (
        Trainer(tune_learner(load_config(tune_file(tmp_path, mixture, steps=2))), run).fit()
        is Outcome.FINISHED
    )
    assert taken_for_weights(run) == {"model.safetensors"}
    assert tensors_found(run) == set(tensor_plan(open_source(run).config))


@pytest.mark.parametrize(
    ("mode", "file"), [("ffn-adapter", "adapter_model.safetensors"), ("ffn", "model.safetensors")]
)
def test_a_branch(tiny_checkpoint, tmp_path: Path, mode: str, file: str) -> None:
    base = checkpoint(tiny_checkpoint("llama"), tmp_path / "base")
    jsonl(tmp_path / "one.jsonl", texts(60))
    raw = {
        "base": str(base),
        "mode": mode,
        "steps": 2,
        "dtype": "float32",
        "schedule": {"warmup": 1},
        "batch": {"windows": 2, "micro": 2},
        "data": {"window": 32, "cache": str(tmp_path / "cache")},
        "experts": [{"name": "one", "data": "one.jsonl"}],
    }
    (tmp_path / "branch.yaml").write_text(yaml.safe_dump(raw))
    branch(load_branch(tmp_path / "branch.yaml"), tmp_path / "out", echo=lambda line: None)
    assert taken_for_weights(tmp_path / "out" / "one") == {file}
