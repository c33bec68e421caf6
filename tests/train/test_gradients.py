"""Whole steps and single gradients against transformers, peft, closed forms and float64 twins."""

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from small import checkpoint, tune_file
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from octad.model.config import ModelConfig
from octad.model.moe import Router
from octad.model.transformer import Transformer
from octad.train.data import IGNORED
from octad.train.learner import tune_learner
from octad.train.loss import next_token_loss
from octad.train.lowrank import LowRankEmbedding, LowRankLinear
from octad.train.routers import TrainRouter, swap_routers
from octad.train.run_config import load_config
from octad.train.sections import LowRankSpec, RoutingSpec
from octad.train.trainer import Trainer, head_of


def config(**changes: object) -> ModelConfig:
    raw = {"model_type": "qwen3_moe", "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5}
    raw |= {"moe_intermediate_size": 5, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 4}
    raw |= {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return ModelConfig.from_dict(raw | changes)


def test_steps_of_the_trainer_equal_transformers_with_adamw(tiny_checkpoint, tmp_path: Path) -> None:
    """Three steps of accumulated micro-batches, clipped, decayed: every parameter of a two-layer Mixtral."""
    mixture = checkpoint(tiny_checkpoint("mixtral"), tmp_path / "mixture")
    file = tune_file(
        tmp_path,
        mixture,
        mode="all",
        optimizer={"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.1, "clip": 0.5},
        schedule={"name": "constant", "warmup": 0},
        batch={"windows": 4, "micro": 2},
    )
    run = Trainer(tune_learner(load_config(file)), tmp_path / "run")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32).train()
    plain = [p for n, p in theirs.named_parameters() if p.dim() < 2 or "gate.weight" in n]
    rest = [p for n, p in theirs.named_parameters() if not (p.dim() < 2 or "gate.weight" in n)]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)
    position = run.stream.state_dict()
    batches = [run.stream.next(4) for _ in range(3)]
    run.stream.load_state_dict(position)
    for batch in batches:
        mine = run.train_step()[0]
        within = batch.documents[:, :, None] == batch.documents[:, None, :]
        mask = (within & torch.ones(32, 32, dtype=torch.bool).tril())[:, None]
        logits = theirs(batch.tokens, attention_mask=mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
        assert mine["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        assert mine["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    expected = {n.replace("block_sparse_moe", "mlp"): p for n, p in theirs.named_parameters()}
    assert float(norm) > 0.5
    for name, value in run.optimizer.values().items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("top1", ["straight-through", "switch"])
def test_the_routers_gradient_is_that_of_the_chosen_probability(top1: str) -> None:
    """Closed form: d p_e / d w_j = p_e ([e = j] - p_j) x, times what the weight is multiplied by."""
    torch.manual_seed(0)
    plain = Router(config(num_experts_per_tok=1, norm_topk_prob=top1 != "switch"))
    nn.init.normal_(plain.weight)
    router = TrainRouter(plain, RoutingSpec(top1=top1))  # type: ignore[arg-type]
    x, dy = torch.randn(7, 6), torch.randn(7, 1)
    weights, experts = router(x)
    (weights * dy).sum().backward()
    p = (x @ plain.weight.detach().T).softmax(-1)
    chosen = p.gather(1, experts)
    expected = (dy * chosen * (F.one_hot(experts[:, 0], 4) - p)).T @ x
    torch.testing.assert_close(router.weight.grad, expected)


def test_routers_losses_of_several_layers_are_the_mean_of_transformers() -> None:
    torch.manual_seed(0)
    model = Transformer(config())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    spec = RoutingSpec(balance=0.7, z=0.1)
    routers = swap_routers(model, spec)
    model.train()(torch.randint(0, 11, (2, 9)))
    routed = [router.take() for router in routers]
    mine = sum(r.loss(spec) for r in routed) / len(routed)
    balance = [load_balancing_loss_func((r.logits,), 4, 2) for r in routed]
    z = [r.logits.exp().sum(-1).log().pow(2).mean() for r in routed]
    torch.testing.assert_close(mine, 0.7 * torch.stack(balance).mean() + 0.1 * torch.stack(z).mean())


def test_low_rank_linear_has_the_gradients_of_peft() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False).requires_grad_(False)
    mine = LowRankLinear(base, LowRankSpec(rank=2, alpha=6))
    nn.init.normal_(mine.lora_B)
    theirs = peft.get_peft_model(
        nn.Sequential(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"])
    ).base_model.model[0]
    theirs.lora_A["default"].weight.data = mine.lora_A.detach().clone()
    theirs.lora_B["default"].weight.data = mine.lora_B.detach().clone()
    x, dy = torch.randn(7, 6, requires_grad=True), torch.randn(7, 5)
    y, reference = mine(x), theirs(x)
    torch.testing.assert_close(y, reference)
    found = torch.autograd.grad(y, (x, mine.lora_A, mine.lora_B), dy)
    expected = torch.autograd.grad(
        reference, (x, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight), dy
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_tied_low_rank_embedding_learns_from_both_ends() -> None:
    """Embedding and head share the factors; a float64 twin multiplies the changed matrix out."""
    torch.manual_seed(0)
    model = Transformer(config(tie_word_embeddings=True)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.requires_grad_(False)
    embedding = LowRankEmbedding(model.model.embed_tokens, LowRankSpec(rank=2, alpha=6))
    nn.init.normal_(embedding.lora_B)
    model.model.embed_tokens = embedding  # type: ignore[assignment]
    factors, tokens = (embedding.lora_A, embedding.lora_B), torch.randint(0, 11, (2, 9))
    targets = tokens[:, 1:].flatten()
    total, _ = next_token_loss(head_of(model), model.model(tokens[:, :-1]).flatten(0, 1), targets)
    whole = embedding.weight
    plain = Transformer(config(tie_word_embeddings=True)).double()
    state = {n.replace("embed_tokens.base", "embed_tokens"): p for n, p in model.named_parameters()}
    state = {n: p for n, p in state.items() if "lora" not in n} | {"model.embed_tokens.weight": whole}
    logits = torch.func.functional_call(plain, state, (tokens[:, :-1],))
    expected = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    torch.testing.assert_close(total, expected.float())
    for mine, theirs in zip(
        torch.autograd.grad(total, factors), torch.autograd.grad(expected, factors), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
