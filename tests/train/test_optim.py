"""Optimisers: the same steps as torch's own, float32 masters under bfloat16, schedules by hand, a state that restores."""

import pytest
import torch
from torch import nn

from octad.train.optim import Optimizer, learning_rate
from octad.train.sections import OptimizerSpec, ScheduleSpec


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "model.layers.0.mlp.experts.down_proj": (3, 4, 5),
        "model.layers.0.mlp.gate.weight": (3, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.norm.weight": (4,),
    }
    return {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}


def give_gradients(trainable: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for p in trainable.values():
        p.grad = torch.randn(p.shape).to(p.dtype)


def run(trainable: dict[str, nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(trainable, step)
        optimizer.collect()
        optimizer.step(0.5, optimizer.norm())


def test_adamw_equals_torch_with_clipping_and_groups() -> None:
    mine, twin = parameters(), parameters()
    spec = OptimizerSpec(lr=0.1, weight_decay=0.3, router_lr=0.02, clip=1.0)
    run(mine, Optimizer(mine, spec), range(5))
    decayed = [p for n, p in twin.items() if p.dim() > 1 and "gate" not in n]
    groups = [
        {"params": decayed, "lr": 0.05, "weight_decay": 0.3},
        {"params": [twin["model.norm.weight"]], "lr": 0.05, "weight_decay": 0.0},
        {"params": [twin["model.layers.0.mlp.gate.weight"]], "lr": 0.01, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(5):
        give_gradients(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.values(), 1.0)
        reference.step()
    for name in mine:
        torch.testing.assert_close(mine[name], twin[name])


def test_muon_takes_the_experts_one_matrix_at_a_time() -> None:
    mine, twin = parameters(), parameters()
    run(mine, Optimizer(mine, OptimizerSpec(name="muon", lr=0.1, clip=1e9)), range(3))
    name = "model.layers.0.mlp.experts.down_proj"
    leaves = [nn.Parameter(piece) for piece in twin[name].detach().unbind()]
    reference = torch.optim.Muon(leaves, lr=0.05, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients(twin, step)
        for leaf, grad in zip(leaves, twin[name].grad.unbind(), strict=True):
            leaf.grad = grad
        reference.step()
    torch.testing.assert_close(mine[name], twin[name])


def test_masters_learn_what_bfloat16_would_round_away() -> None:
    mine = {"w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimizer = Optimizer(mine, OptimizerSpec(lr=1e-3))
    for _ in range(10):
        mine["w"].grad = torch.ones_like(mine["w"])
        optimizer.collect()
        optimizer.step(1.0, 1.0)
    torch.testing.assert_close(optimizer.values()["w"], torch.full((4,), 0.99), atol=1e-5, rtol=0)
    torch.testing.assert_close(mine["w"], optimizer.values()["w"].bfloat16())
    assert mine["w"][0] < 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_restores_bit_for_bit(name: str) -> None:
    spec = OptimizerSpec(name=name, weight_decay=0.1)
    whole, part, rest = parameters(torch.bfloat16), parameters(torch.bfloat16), parameters(torch.bfloat16)
    run(whole, Optimizer(whole, spec), range(6))
    first = Optimizer(part, spec)
    run(part, first, range(3))
    second = Optimizer(rest, spec)
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()})
    run(rest, second, range(3, 6))
    for key in whole:
        assert torch.equal(whole[key], rest[key])


def test_schedules_by_hand() -> None:
    def rates(name: str, **changes: object) -> list[float]:
        spec = ScheduleSpec(name=name, warmup=2, final=0.0, **changes)
        return [round(learning_rate(step, 8, spec), 4) for step in range(8)]

    assert rates("constant") == [0.5] + [1.0] * 7
    assert rates("linear") == [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0]
    assert rates("wsd", decay=0.5) == [0.5, 1, 1, 1, 1, 0.6667, 0.3333, 0]
    cosine = rates("cosine")
    assert cosine[2] == 1
    assert cosine[-1] == 0
    assert cosine[4] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(0.4 * torch.pi)).item()), abs=1e-4)
