"""One rank of a big cluster on pretended tensors: octad's own layout and optimiser, shapes without values, bytes counted.

    python pretended_cluster.py '{"config": {...}, "world": 16, "expert": 8, "tokens": 2048, "recompute": true}'

Prints JSON: bytes of the peak of the second step (the first has no moments yet) by kind, as torch's MemTracker counts.
What would depend on values, which experts tokens go to, is replaced by an even spread.
"""

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from octad.dist import World
from octad.fast import expert_parallel, training_experts
from octad.fast.document_attention import DocumentAttention
from octad.kernels import blocked
from octad.kernels.passes import Passes
from octad.model.config import ModelConfig
from octad.model.transformer import Transformer
from octad.train import loss
from octad.train.layout import Layout
from octad.train.learner import choose, prepare_mixture
from octad.train.loss import next_token_loss
from octad.train.optim import Optimizer
from octad.train.recompute import checkpoint_activations
from octad.train.routers import TrainRouter
from octad.train.sections import OptimizerSpec, RoutingSpec
from octad.train.trainer import head_of


def even_choices(experts_NA: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    rows = experts_NA.numel()
    return torch.arange(rows), [rows // experts] * experts


def even_exchange(
    own: Any, mine: int, group: Any, x_ND: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor
) -> torch.Tensor:
    ranks, count = group.size(), experts_NA.numel()
    order = torch.argsort(experts_NA.flatten())
    rows, each = order // experts_NA.shape[1], [count // ranks] * ranks
    x = expert_parallel._travel(x_ND[rows], each, each, group)
    weights = expert_parallel._travel(weights_NA.flatten()[order].to(x_ND.dtype), each, each, group)
    y = own(x, weights[:, None], (torch.arange(count) % mine)[:, None])
    return torch.zeros_like(x_ND).index_add(0, rows, expert_parallel._travel(y, each, each, group))


def pretend_evenly() -> None:
    """Nothing asks for a value any more."""
    TrainRouter.to = lambda self, *a, **k: self  # type: ignore[method-assign, assignment]
    training_experts.sorted_choices = even_choices
    for module in (training_experts, loss, blocked):
        module.quick_passes = Passes  # type: ignore[attr-defined]
    expert_parallel.exchanged = even_exchange


def peak(config: ModelConfig, world: int, expert: int, tokens: int, recompute: bool) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    layout = Layout(World(0, world), torch.device("cpu"), True, expert)
    for mesh in (layout.flat, layout.grid["expert"], layout.grid["data"]):
        assert mesh.size() > 0  # made before tensors are pretended
    attention = DocumentAttention(
        config, torch.zeros(1, tokens)
    )  # one document, cut before tensors are pretended
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model = Transformer(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        prepare_mixture(model, RoutingSpec())
        names = choose(model, "")
        layout.spread(model)
        if recompute:
            checkpoint_activations(model)
        whole = layout.shard(model)
        learning = {name: model.get_parameter(name) for name in names}
        optimizer = Optimizer(learning, OptimizerSpec(), layout.pieces(learning))
        ids = torch.zeros(1, tokens, dtype=torch.long)

        def loss_of() -> torch.Tensor:
            x_ND = model.model(ids, attention).flatten(0, 1)
            return next_token_loss(head_of(model), x_ND, ids[0])[0]

        def step() -> None:
            whole(loss_of).backward()
            optimizer.collect()
            optimizer.step(1.0, 0.5)

        step()
        tracker = MemTracker()
        tracker.track_external(model, *optimizer.parts, *(m.values for m in optimizer.masters.values()))
        with tracker:
            step()
        kinds = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(kind).rpartition(".")[2]: size for kind, size in kinds.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    asked = json.loads(sys.argv[1])
    pretend_evenly()
    asked["config"] = ModelConfig.from_dict(asked["config"])
    print(json.dumps(peak(**asked)))
