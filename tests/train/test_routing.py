"""Balance, routers, experts and loss: gradients against finite differences, a step against transformers' Mixtral."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from octad.errors import RecipeError
from octad.fast.training_experts import TrainExperts, sorted_choices
from octad.model.balance import (
    LoadStatistics,
    expert_load,
    load_balancing_loss,
    router_entropy,
    router_z_loss,
    update_bias,
)
from octad.model.config import ModelConfig
from octad.model.moe import Experts, Router
from octad.model.transformer import Transformer
from octad.train.data import IGNORED
from octad.train.loss import Head, Teacher, next_token_loss
from octad.train.routers import TrainRouter, swap_routers
from octad.train.sections import RoutingSpec


def config(experts: int = 4, top_k: int = 2, family: str = "qwen3_moe", **changes: object) -> ModelConfig:
    raw = {"model_type": family, "vocab_size": 11, "hidden_size": 6, "intermediate_size": 5}
    raw |= {"moe_intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    raw |= {"num_key_value_heads": 2}
    counts = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": top_k}
    return ModelConfig.from_dict(raw | counts | {"norm_topk_prob": True} | changes)


def router(spec: RoutingSpec | None = None, **changes: object) -> TrainRouter:
    plain = Router(config(**changes))
    torch.manual_seed(0)
    torch.nn.init.normal_(plain.weight)
    return TrainRouter(plain, spec or RoutingSpec())


# ---- balance -----------------------------------------------------------------------------------------------


def test_losses_equal_finite_differences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    experts = logits.topk(2).indices
    torch.autograd.gradcheck(lambda x: load_balancing_loss(x, experts), logits)
    torch.autograd.gradcheck(router_z_loss, logits)


def test_balancing_loss_equals_transformers_and_its_extremes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    mine = load_balancing_loss(logits, logits.topk(2).indices)
    torch.testing.assert_close(mine, load_balancing_loss_func((logits,), 8, 2))
    even = load_balancing_loss(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    assert even == pytest.approx(1)
    alone = torch.tensor([[99.0, 0, 0, 0]] * 8)
    assert load_balancing_loss(alone, torch.zeros(8, 1, dtype=torch.long)) == pytest.approx(4)


def test_statistics_by_hand() -> None:
    load = expert_load(torch.tensor([[0, 1], [0, 1], [0, -1]]), 4)
    assert load.tolist() == [3, 2, 0, 0]
    found = LoadStatistics.of(load, 0.5)
    assert found.max_violation == pytest.approx(3 / (5 / 4) - 1)
    assert found.dead == (2, 3)
    assert float(router_entropy(torch.zeros(3, 8))) == pytest.approx(math.log(8))


def test_several_steps_together_by_hand() -> None:
    first = LoadStatistics.of(torch.tensor([3, 1, 0]), 1.0, 0.5)
    second = LoadStatistics.of(torch.tensor([1, 0, 0]), 2.0, 0.0)
    found = LoadStatistics.over([first, second])
    assert found.share == pytest.approx(((0.75 + 1) / 2, 0.125, 0))
    assert found.max_violation == pytest.approx(0.875 * 3 - 1)
    assert (found.entropy, found.dropped, found.dead) == (
        1.5,
        0.25,
        (2,),
    )  # expert 1 was dead in one step only


def test_bias_balances_a_lopsided_router() -> None:
    torch.manual_seed(0)
    p = (torch.randn(4000, 8) + torch.arange(8) * 0.5).softmax(-1)
    bias = torch.zeros(8)
    before = expert_load(p.topk(2).indices, 8)
    for _ in range(400):
        update_bias(bias, expert_load((p + bias).topk(2).indices, 8), 1e-3)
    after = expert_load((p + bias).topk(2).indices, 8)
    assert LoadStatistics.of(before, 0).max_violation > 1
    assert LoadStatistics.of(after, 0).max_violation < 0.1


# ---- router ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2])
def test_router_equals_the_plain_one(top_k: int) -> None:
    plain, x = Router(config(top_k=top_k)), torch.randn(20, 6)
    torch.nn.init.normal_(plain.weight)
    mine = TrainRouter(plain, RoutingSpec())
    for mode in (mine.eval(), mine.train()):
        weights, experts = mode(x)
        torch.testing.assert_close(weights, plain(x)[0])
        assert torch.equal(experts, plain(x)[1])


def test_a_single_expert_has_a_gradient() -> None:
    x = torch.randn(9, 6)
    straight = router(top_k=1)
    weights, _ = straight(x)
    torch.testing.assert_close(weights, torch.ones(9, 1))
    weights.sum().backward()
    switch = router(RoutingSpec(top1="switch"), top_k=1, norm_topk_prob=False)
    other, _ = switch(x)
    other.sum().backward()
    assert (other < 1).all()
    assert straight.weight.grad.abs().sum() > 0
    torch.testing.assert_close(straight.weight.grad, switch.weight.grad)


def test_capacity_drops_the_last_and_counts_them() -> None:
    gate = router(RoutingSpec(capacity=1.0), experts=2, top_k=1)
    gate.weight.data = torch.tensor([[1.0] * 6, [-1.0] * 6])
    weights, experts = gate(torch.ones(10, 6))  # all want expert 0, which serves 5
    assert experts.flatten().tolist() == [0] * 5 + [-1] * 5
    assert weights.flatten().tolist() == [1] * 5 + [0] * 5
    gate.take()
    found = gate.finish_step(0.0)
    assert (found.dropped, found.share, found.dead) == (0.5, (1.0, 0.0), (1,))
    assert (gate.eval()(torch.ones(10, 6))[1] == 0).all()


def test_sampling_follows_the_probabilities() -> None:
    gate = router(RoutingSpec(sample=True), top_k=1)
    x = torch.randn(1, 6).expand(20000, 6)
    p = (x[0] @ gate.weight.T).softmax(-1)
    shares = expert_load(gate(x)[1], 4) / 20000
    torch.testing.assert_close(shares, p.detach(), atol=0.02, rtol=0)


def test_switch_is_refused_where_the_family_renormalises() -> None:
    model = Transformer(config(top_k=1, family="mixtral"))
    with pytest.raises(RecipeError, match="use straight-through"):
        swap_routers(model, RoutingSpec(top1="switch"))


# ---- experts and loss --------------------------------------------------------------------------------------


def test_experts_equal_the_loop_and_finite_differences() -> None:
    torch.manual_seed(0)
    loop = Experts(config()).double()
    for p in loop.parameters():
        torch.nn.init.normal_(p, std=0.5)
    mine = TrainExperts(loop)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1], [0, 1]])
    torch.testing.assert_close(mine(x, weights, experts), loop(x, weights, experts))

    def run(x, weights, gate_up, down):
        return torch.func.functional_call(
            mine, {"gate_up_proj": gate_up, "down_proj": down}, (x, weights, experts)
        )

    torch.autograd.gradcheck(run, (x, weights, loop.gate_up_proj, loop.down_proj))
    dropped = mine(x, weights, experts.clone().fill_(-1))
    assert (dropped == 0).all()


@pytest.mark.parametrize("changed", [False, True])
def test_filled_blocks_hold_every_choice_once_and_change_nothing(changed: bool, monkeypatch) -> None:
    """300 choices of 4 experts, a third of one token's dropped: blocks of multiples of 4, computed in several slices."""
    for name, value in {"CACHED": 200, "LEAST": 1, "SIZE": 4}.items():
        monkeypatch.setattr(f"octad.fast.products.{name}", value)
    torch.manual_seed(0)
    loop = Experts(config())
    for p in loop.parameters():
        torch.nn.init.normal_(p, std=0.5)
    experts = torch.rand(150, 4).argsort(1)[:, :2]
    experts[::3, 1] = -1
    order, counts = sorted_choices(experts, 4)
    assert all(count % 4 == 0 for count in counts)
    owners = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    real = order < 300
    assert sorted(order[real].tolist()) == (experts.flatten() >= 0).nonzero().flatten().tolist()
    assert (experts.flatten()[order[real]] == owners[real]).all()
    assert 0 < len(order) - int(real.sum()) <= 4 * 3
    x, weights = torch.randn(150, 6, requires_grad=True), torch.rand(150, 2, requires_grad=True)
    module = TrainExperts(loop)
    leaves, sums = [x, weights], dict(loop.named_parameters())
    if changed:
        sizes = {name: ((4, 2, w.shape[2]), (4, w.shape[1], 2)) for name, w in sums.items()}
        module.change(
            {n.removesuffix("_proj"): tuple(map(torch.randn, pair)) for n, pair in sizes.items()}, 0.7
        )
        factors = {name: module.factors(name.removesuffix("_proj")) for name in sums}
        leaves += [part for pair in factors.values() for part in pair]
        sums = {name: w + 0.7 * factors[name][1] @ factors[name][0] for name, w in sums.items()}
    else:
        leaves += sums.values()
    mine = module(x, weights, experts)
    kept = weights * (experts >= 0)
    theirs = torch.func.functional_call(loop, sums, (x, kept, experts.clamp_min(0)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(mine)
    pairs = zip(*(torch.autograd.grad(y, leaves, seed) for y in (mine, theirs)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_changed_experts_equal_the_loop_over_their_sum_and_finite_differences() -> None:
    """W + scale * B A, by hand; the frozen W gets no gradient."""
    torch.manual_seed(0)
    loop = Experts(config()).double().requires_grad_(False)
    for p in loop.parameters():
        torch.nn.init.normal_(p, std=0.5)
    mine = TrainExperts(loop)
    stacks = {"gate_up": loop.gate_up_proj, "down": loop.down_proj}
    sizes = {name: ((4, 2, w.shape[2]), (4, w.shape[1], 2)) for name, w in stacks.items()}
    factors = {name: [torch.randn(*s, dtype=torch.float64) for s in pair] for name, pair in sizes.items()}
    mine.change({name: (a, b) for name, (a, b) in factors.items()}, 0.7)
    names = [f"{name}_lora_{letter}" for name in factors for letter in "AB"]
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 1], [1, 3], [3, 0], [0, -1], [1, 0], [3, 1], [0, 1]])

    def run(x, weights, *values):
        return torch.func.functional_call(mine, dict(zip(names, values, strict=True)), (x, weights, experts))

    values = [part.clone().requires_grad_() for pair in factors.values() for part in pair]
    torch.autograd.gradcheck(run, (x, weights, *values))
    found = run(x, weights, *values)
    found.sum().backward()
    assert mine.gate_up_proj.grad is None
    for name, (a, b) in factors.items():
        stacks[name] += 0.7 * b @ a
    kept = weights.detach() * (experts >= 0)
    torch.testing.assert_close(found, loop(x, kept, experts.clamp_min(0)))


def test_frozen_experts_get_no_gradient_but_pass_one_on() -> None:
    loop = Experts(config()).requires_grad_(False)
    torch.nn.init.normal_(loop.gate_up_proj)
    torch.nn.init.normal_(loop.down_proj)
    x, weights = torch.randn(5, 6, requires_grad=True), torch.rand(5, 1, requires_grad=True)
    TrainExperts(loop)(x, weights, torch.tensor([[0], [1], [2], [0], [1]])).sum().backward()
    assert loop.gate_up_proj.grad is None
    assert x.grad.abs().sum() > 0
    assert weights.grad.abs().sum() > 0


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("taught", [False, True])
def test_loss_equals_cross_entropy_and_its_gradients(low_rank: bool, taught: bool, monkeypatch) -> None:
    monkeypatch.setattr("octad.train.loss.SLICE", 4)
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((10, 6), (11, 6), (2, 6), (11, 2)))
    leaves = [t.clone().requires_grad_() for t in (x, w, a, b)]
    twins = [t.clone().requires_grad_() for t in (x, w, a, b)]
    targets = torch.randint(0, 11, (10,))
    targets[3] = IGNORED
    teacher = Teacher(torch.randn(10, 6, dtype=torch.float64), w.clone(), 0.3) if taught else None
    head = Head(leaves[1], leaves[2], leaves[3], 0.5) if low_rank else Head(leaves[1])
    total, losses = next_token_loss(head, leaves[0], targets, teacher)
    (total / 7).backward()
    logits = twins[0] @ twins[1].T
    if low_rank:
        logits = logits + 0.5 * twins[0] @ twins[2].T @ twins[3].T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    torch.testing.assert_close(losses.sum(), expected.float())
    if teacher is not None:
        p = (teacher.x @ teacher.weight.T).softmax(-1)
        soft = torch.nn.functional.cross_entropy(logits, p, reduction="none")[targets != IGNORED].sum()
        expected = 0.7 * expected + 0.3 * soft
    (expected / 7).backward()
    torch.testing.assert_close(total, expected.float())
    for mine, theirs in zip(leaves if low_rank else leaves[:2], twins, strict=False):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("balance", [0.0, 0.02])
def test_a_training_step_equals_transformers_mixtral(tiny_model, balance: float) -> None:
    """Loss and every gradient, with one layer, over which transformers' pooled balancing loss is the same as ours."""
    theirs = tiny_model(
        "mixtral", num_hidden_layers=1, output_router_logits=balance > 0, router_aux_loss_coef=balance
    ).train()
    from octad.checkpoint.names import parameter_sources

    mine = Transformer(ModelConfig.from_dict(theirs.config.to_dict()))
    state = {
        name.replace("block_sparse_moe", "mlp"): value.clone() for name, value in theirs.state_dict().items()
    }
    mine.load_state_dict(state)
    spec = RoutingSpec(balance=balance)
    routers = swap_routers(mine, spec)
    mine.model.layers[0].mlp.experts = TrainExperts(mine.model.layers[0].mlp.experts)
    mine.train()
    tokens = torch.randint(0, 96, (3, 20))
    x = mine.model(tokens[:, :-1]).flatten(0, 1)
    total, _ = next_token_loss(Head(mine.lm_head.weight), x, tokens[:, 1:].flatten())
    loss = total / x.shape[0] + routers[0].take().loss(spec)
    loss.backward()
    targets = tokens[:, 1:].contiguous()
    reference = theirs(tokens[:, :-1], shift_labels=targets, labels=targets)
    reference.loss.backward()
    torch.testing.assert_close(loss, reference.loss)
    expected = {n.replace("block_sparse_moe", "mlp"): p.grad for n, p in theirs.named_parameters()}
    assert set(dict(mine.named_parameters())) == set(expected) == set(parameter_sources(mine.config))
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)
