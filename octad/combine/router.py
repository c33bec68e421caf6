"""Router fits: from the gate inputs of each expert's own text to the weights of a linear router, layer by layer.

    ridge(statistics, layer)                closed form from means and summed grams (DUME, arXiv 2603.29765)
    logistic(x, weights, labels)            multinomial logistic regression on the same inputs
    prompts(positive, negative)             difference of means, as users of mergekit-moe know it
    random(...)                             what a fit has to beat

The formats have no bias and no temperature. The temperature is folded into the weight. An intercept would have to live on
a direction with the same projection for every token; with classes of equal mass it is all but zero, and none is fitted.

Shapes: E experts, D model, N tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from octad.combine.statistics import Statistics

DEFAULT_TEMPERATURE = {"ridge": 0.15, "logistic": 1.0, "prompts": 0.2}


def ridge(statistics: Statistics, layer: int, *, strength: float, temperature: float) -> torch.Tensor:
    """weight_ED of one layer: least squares on one-hot labels, every expert's text with the same total weight.

    `strength` is the ridge in units of the gram's mean diagonal. Solved in float64."""
    gram = statistics.grams[layer].double()
    means_ED = statistics.means[layer].double()
    ridge_term = strength * gram.diagonal().mean().clamp_min(1e-12)
    system = gram + ridge_term * torch.eye(len(gram), dtype=torch.float64)
    weight_ED: torch.Tensor = torch.linalg.solve(system, means_ED.T).T / temperature
    return weight_ED.float()


def logistic(
    x_ND: torch.Tensor,
    weight_N: torch.Tensor,
    label_N: torch.Tensor,
    *,
    strength: float,
    temperature: float,
    steps: int = 60,
) -> torch.Tensor:
    """weight_ED by L-BFGS on the weighted cross-entropy of "whose text is this token from", experts balanced."""
    experts = int(label_N.max()) + 1
    mass = torch.zeros(experts).index_add_(0, label_N, weight_N)
    importance = weight_N / mass[label_N] / experts
    scale = x_ND.square().mean().sqrt()
    inputs = x_ND / scale
    weight = torch.zeros(experts, x_ND.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        losses = F.cross_entropy(F.linear(inputs, weight), label_N, reduction="none")
        value: torch.Tensor = (losses * importance).sum() + strength * 1e-2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach() / scale / temperature


def prompts(
    positive: Sequence[torch.Tensor], negative: Sequence[torch.Tensor | None], *, temperature: float
) -> torch.Tensor:
    """weight_ED from prompts: mean gate input of an expert's positive prompts minus that of its negative ones.

    positive[e] and negative[e] are means, [D]; without negative prompts, the other experts' positive ones stand for them.
    Every token of a prompt counts and no padding does. Rows are scaled to separate the two means by 1 / temperature."""
    means = torch.stack(list(positive))
    rows = []
    for e, against in enumerate(negative):
        others = [i for i in range(len(means)) if i != e]
        direction = means[e] - (means[others].mean(0) if against is None else against)
        rows.append(direction / direction.square().sum().clamp_min(1e-12))
    return torch.stack(rows) / temperature


def random(experts: int, dim: int, *, seed: int, layer: int) -> torch.Tensor:
    """weight_ED drawn from N(0, 1/D): unlearned, the same on every run."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{layer}".encode()))
    weight_ED: torch.Tensor = torch.randn(experts, dim, generator=draw) / dim**0.5
    return weight_ED
