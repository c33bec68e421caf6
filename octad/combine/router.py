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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from octad.combine.statistics import Statistics, add_gram

DEFAULT_STRENGTH = {"ridge": 0.01, "logistic": 1e-3}
DEFAULT_TEMPERATURE = {"ridge": 0.15, "logistic": 1.0, "prompts": 0.2}
WARM_STRENGTH = 0.01  # of the ridge that the logistic fit starts from
BLOCK = 1024  # rows that are float32 at a time: they stay in the cache


@dataclass(frozen=True)
class Favoured:
    """An expert that scores `score` more on inputs x_ND, in their mean."""

    expert: int
    x_ND: torch.Tensor
    score: float


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
    steps: int = 10,
    favoured: Favoured | None = None,
) -> torch.Tensor:
    """weight_ED by L-BFGS on the weighted cross-entropy of "whose text is this token from", experts balanced.

    `strength` is the L2 penalty in units of the gram's mean diagonal. Starts at ridge and works in coordinates in which
    the inputs are white, so that ten steps are nearly enough. x may be of any dtype; a block of it is float32 at a time.
    Who is `favoured` gets more on its inputs than its share of the text gives it, and hardly more on others.
    """
    experts = int(label_N.max()) + 1
    share_N = weight_N / torch.zeros(experts).index_add_(0, label_N, weight_N)[label_N] / experts
    gram, means_ED = _moments(x_ND, share_N, label_N, experts)
    scale = float(gram.diagonal().mean().clamp_min(1e-12))
    factor = torch.linalg.cholesky(gram.double() + WARM_STRENGTH * scale * torch.eye(len(gram))).float()

    def coloured(white_ED: torch.Tensor) -> torch.Tensor:
        weight_ED: torch.Tensor = torch.linalg.solve_triangular(
            factor, white_ED.detach(), upper=False, left=False
        )
        return weight_ED.contiguous()  # row by row: products with the other layout are far slower

    def whitened(slope_ED: torch.Tensor) -> torch.Tensor:
        white_ED: torch.Tensor = torch.linalg.solve_triangular(factor.T, slope_ED, upper=True, left=False)
        return white_ED.contiguous()

    def loss() -> float:
        weight_ED = coloured(white_ED)
        value, slope_ED = _cross_entropy(x_ND, share_N, label_N, weight_ED)
        white_ED.grad = whitened(slope_ED + 2 * strength * scale * weight_ED)
        return value + strength * scale * float(weight_ED.square().sum())

    white_ED = whitened(means_ED / DEFAULT_TEMPERATURE["ridge"]).requires_grad_()
    optimiser = torch.optim.LBFGS([white_ED], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")
    optimiser.step(loss)  # type: ignore[no-untyped-call]
    weight_ED = coloured(white_ED) / temperature
    if favoured is not None:
        favour(weight_ED, favoured.expert, favoured.x_ND, favoured.score, factor)
    return weight_ED


def favour(
    weight_ED: torch.Tensor,
    expert: int,
    x_ND: torch.Tensor,
    score: float,
    factor_DD: torch.Tensor | None = None,
) -> None:
    """Add `score` to what an expert scores on inputs x, in their mean: in place, along their mean, for want of a bias.

    With the Cholesky factor of all inputs' gram, along what tells x from the others by least squares: a target of 1 on x
    and 0 elsewhere. Text that is unlike x then goes where it went."""
    mean_D = x_ND.float().mean(0)
    along_D = mean_D if factor_DD is None else torch.cholesky_solve(mean_D[:, None], factor_DD)[:, 0]
    weight_ED[expert] += score * along_D / (mean_D @ along_D).clamp_min(1e-12)


def _blocks(
    x_ND: torch.Tensor, share_N: torch.Tensor, label_N: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same rows of all three, BLOCK at a time, x in float32."""
    for start in range(0, len(x_ND), BLOCK):
        rows = slice(start, start + BLOCK)
        yield x_ND[rows].float(), share_N[rows], label_N[rows]


def _moments(
    x_ND: torch.Tensor, share_N: torch.Tensor, label_N: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums: gram_DD of all inputs, and means_ED of each expert's."""
    gram = torch.zeros(x_ND.shape[1], x_ND.shape[1])
    means_ED = torch.zeros(experts, x_ND.shape[1])
    for x, share, label in _blocks(x_ND, share_N, label_N):
        weighted = x * share[:, None]
        means_ED.index_add_(0, label, weighted)
        if bool((share == share[0]).all()):
            add_gram(gram, x.to(x_ND.dtype), float(share[0]))
        else:
            gram.addmm_(weighted.T, x)
    return gram, means_ED


def _cross_entropy(
    x_ND: torch.Tensor, share_N: torch.Tensor, label_N: torch.Tensor, weight_ED: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """The weighted sum of -log softmax(weight x)[label], and its derivative slope_ED."""
    total, slope_ED = 0.0, torch.zeros_like(weight_ED)
    for x, share, label in _blocks(x_ND, share_N, label_N):
        logs_EN = (weight_ED @ x.T).log_softmax(0)
        total -= float(share @ logs_EN.gather(0, label[None])[0])
        miss_EN = logs_EN.exp_()
        miss_EN[label, torch.arange(len(x))] -= 1
        slope_ED.addmm_(miss_EN.mul_(share), x)
    return total, slope_ED


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
