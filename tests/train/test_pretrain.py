"""Models from nothing: twins of equal active cost, upcycling that begins as the dense model, runs that learn and load."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml
from small import character_tokenizer, jsonl, texts

from octad.checkpoint.load import load_model, open_source
from octad.errors import CheckpointError, RecipeError
from octad.model import cost
from octad.model.config import ModelConfig
from octad.train.pretrain import architecture, pretrain_learner
from octad.train.run_config import ArchitectureSpec, load_config
from octad.train.trainer import Trainer

TINY = {"size": 2, "width": 32, "heads": 2, "feed_forward": 48, "num_experts": 4}


def learner(directory: Path, mode: str, **changes: object):
    character_tokenizer().save(directory)
    jsonl(directory / "a.jsonl", texts(80))
    raw = {
        "task": "pretrain",
        "mode": mode,
        "architecture": TINY | dict(changes.pop("architecture", {})),
        "tokenizer": str(directory),
        "steps": 30,
        "dtype": "float32",
        "optimizer": {"name": "muon", "lr": 0.01, "weight_decay": 0.01},
        "schedule": {"name": "wsd", "warmup": 3},
        "data": {
            "window": 32,
            "cache": str(directory / "cache"),
            "sources": [{"name": "a", "data": "a.jsonl"}],
        },
    }
    (directory / "pretrain.yaml").write_text(yaml.safe_dump(raw | changes))
    return pretrain_learner(load_config(directory / "pretrain.yaml"))


@pytest.mark.parametrize("top_k", [1, 2])
def test_twins_have_equal_active_cost(top_k: int) -> None:
    spec = ArchitectureSpec(size=4, top_k=top_k)
    dense, mixture = (
        ModelConfig.from_dict(architecture(spec, mode, vocab_size=500, window=128))
        for mode in ("dense", "mixture")
    )
    routers = spec.num_experts * dense.hidden_size * dense.num_hidden_layers
    assert cost.parameters(mixture, active=True) - routers == cost.parameters(dense)
    assert cost.parameters(mixture) > 2 * cost.parameters(dense) - 500 * 256


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("dense", {}),
        ("mixture", {"routing": {"balance": 0.01, "capacity": 1.25}}),
        (
            "mixture",
            {"architecture": {"top_k": 1}, "routing": {"top1": "switch", "jitter": 0.01, "bias": 1e-3}},
        ),
    ],
)
def test_a_new_model_learns_and_transformers_computes_it(tmp_path, mode, changes) -> None:
    run = Trainer(learner(tmp_path, mode, **changes), tmp_path / "run")
    first = run.train_step()[0]["loss"]
    run.step += 1
    run.fit()
    run.stream.taken = [0]
    tokens = run.stream.next(4).tokens
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "run", dtype=torch.float32
        ).eval()
        mine = run.model.eval()(tokens)
        torch.testing.assert_close(load_model(open_source(tmp_path / "run"))(tokens), mine)
        torch.testing.assert_close(theirs(tokens).logits, mine, rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(mine[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 0.7 * first


def test_upcycling_begins_as_the_dense_model(tmp_path) -> None:
    Trainer(learner(tmp_path, "dense"), tmp_path / "dense").fit()
    upcycled = learner(tmp_path, "mixture", upcycle=str(tmp_path / "dense"))
    tokens = torch.randint(0, 95, (2, 20))
    with torch.no_grad():
        expected = load_model(open_source(tmp_path / "dense"))(tokens)
        torch.testing.assert_close(upcycled.bring_weights().eval()(tokens), expected)
    with pytest.raises(RecipeError, match=r"upcycle: .*use the architecture of the dense run"):
        learner(tmp_path, "mixture", upcycle=str(tmp_path / "dense"), architecture={"width": 64})


def test_upcycling_midway_begins_as_the_dense_run_was(tmp_path) -> None:
    """From a state of a run that goes on; the run itself is no model yet."""
    run = Trainer(learner(tmp_path, "dense"), tmp_path / "dense")
    (tmp_path / "dense").mkdir()
    for _ in range(3):
        run.train_step()
        run.step += 1
    run.save()
    tokens = torch.randint(0, 95, (2, 20))
    with torch.no_grad():
        expected = run.model.eval()(tokens)
    run.model.train()
    run.train_step()
    state = tmp_path / "dense" / "states" / "step-00000003"
    upcycled = learner(tmp_path, "mixture", upcycle=str(state))
    with torch.no_grad():
        torch.testing.assert_close(upcycled.bring_weights().eval()(tokens), expected)
    assert upcycled.identity["files"]["step"] == 3  # the states of a run are all of one size
    with pytest.raises(
        RecipeError, match=r"dense is not finished; name one of its states, .*step-00000003 say"
    ):
        learner(tmp_path, "mixture", upcycle=str(tmp_path / "dense"))
    (state / "state.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has not the .* bytes"):
        learner(tmp_path, "mixture", upcycle=str(state))
