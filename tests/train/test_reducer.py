"""Gradients are sent while the backward pass goes on, bucket by bucket, in one order, and are those of all ranks."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from octad.train import reducer
from octad.train.optim import Optimizer
from octad.train.reducer import Bucket, Reducer
from octad.train.sections import OptimizerSpec


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two of them, of which this is one; what is sent to the other is doubled, as if it had said the same."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    real = dist.all_reduce

    def doubled(tensor: torch.Tensor, **options: object) -> object:
        tensor.mul_(2)
        return real(tensor, **options)

    monkeypatch.setattr(dist, "all_reduce", doubled)
    yield
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)), nn.Embedding(3, 4))


def gradients(model: nn.Module, frozen: int, overlap: bool, events: list[str]) -> dict[str, torch.Tensor]:
    learning = {n: p for i, (n, p) in enumerate(model.named_parameters()) if i != frozen}
    optimizer = Optimizer(learning, OptimizerSpec())
    adding = Reducer(optimizer, dict.fromkeys(learning))
    hooks = [
        layer.register_full_backward_hook(lambda *_, name=name: events.append(f"backward {name}"))
        for name, layer in model.named_children()
    ]
    for last in (False, True):
        x = torch.ones(2, 4, requires_grad=True)
        with adding.listening(last and overlap):
            model[:4](x).sum().backward()
        events.append("passed")
        optimizer.collect()
    adding.finish()
    for hook in hooks:
        hook.remove()
    return dict(optimizer.named_gradients())


def test_buckets_are_sent_while_earlier_layers_are_computed(ranks: None, monkeypatch) -> None:
    monkeypatch.setattr(reducer, "BUCKET", 128)
    events: list[str] = []
    send = Bucket.send

    def told(bucket: Bucket, tensors: list[torch.Tensor]) -> None:
        events.append("sent " + " ".join(name[0] for name in bucket.names))
        send(bucket, tensors)

    monkeypatch.setattr(Bucket, "send", told)
    early = gradients(network()[:4], -1, True, events)
    second = events[events.index("passed") + 1 :]
    assert "sent" not in " ".join(events[: events.index("passed")])
    assert second.index("sent 3 2") < second.index("backward 0") < second.index("passed")
    assert second.index("sent 1 0") < second.index("passed")
    events.clear()
    late = gradients(network()[:4], -1, False, events)
    assert events[-3:] == ["passed", "sent 3 2", "sent 1 0"]
    plain = network()[:4]
    (plain(torch.ones(2, 4)).sum() * 2).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(early[name], late[name])
        assert torch.equal(early[name], parameter.grad * 2)  # two passes, two ranks


def test_what_has_no_gradient_holds_up_its_bucket_until_the_end(ranks: None, monkeypatch) -> None:
    """All ranks send in one order, whatever each has: the embedding, last of all, was not used."""
    monkeypatch.setattr(reducer, "BUCKET", 16)
    events: list[str] = []
    found = gradients(network(), 1, True, events)
    assert sorted(found) == ["0.weight", "2.weight", "3.weight"]
