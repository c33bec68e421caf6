"""RegMean: the shared linear layers that answer each member's text as that member would, in closed form.

    regression = Regression(source, runs, dtype)
    for step in gate_inputs(source, runs, dtype, write, regression.settle): ...

For the text of member i with inputs X_i to a linear layer, W minimises sum_i s_i |X_i W' - X_i W_i'|^2 over the members
(Jin et al., arXiv 2212.09849). The inputs are those of the mixture itself, whose earlier layers are settled already
(RegMean++, arXiv 2508.03121): first q, k and v of a layer, then, with these, o. Off the diagonal, Gram matrices count
`correlation` times, as the paper has it, and directions that no text goes into keep the members' mean. Norms, biases,
embeddings and head are that mean, too. No gradient; one layer is in memory, as everywhere in combining.

Shapes: B sequences, S positions, N tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from octad.combine.calibrate import Run, Texts
from octad.combine.layer_parts import forget, read_all, shared_block, shared_names
from octad.combine.mixture import MixtureSource
from octad.combine.statistics import add_gram
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer

SMALLEST = 1e-6  # of the mean diagonal, added to it: nothing is divided by zero
INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
)  # linear layers of one input each, in the order of the work


class Regression:
    """Settles a source's attention layer by layer, in the calibration pass."""

    def __init__(self, source: MixtureSource, runs: Sequence[Run], dtype: torch.dtype) -> None:
        self.source, self.runs, self.dtype = source, runs, dtype
        mass = {run.label: 0.0 for run in runs}
        for run in runs:  # every token of a member counts alike, whatever the routers make of it
            mass[run.label] += run.mass() / run.weight
        self.shares = [source.weights[run.label] / mass[run.label] for run in runs]

    @torch.no_grad()
    def settle(self, layer: int, rope: Rope, texts: Texts) -> None:
        """Give the source this layer's linear weights, from the states in which each run's text comes to it."""
        names = shared_names(self.source.config, layer)
        tensors = read_all(self.source, names, self.dtype, forget)
        for group in INPUTS:
            block = shared_block(self.source.config, layer, tensors)
            grams = self._grams(block, getattr(block.self_attn, group[0]), rope, texts)
            for part in group:
                key = f"self_attn.{part}.weight"
                settled = self._solve(names[key], grams)
                self.source.settled[names[key]] = settled
                tensors[key] = settled.to(self.dtype)

    def _grams(
        self, block: DecoderLayer, linear: nn.Linear, rope: Rope, texts: Texts
    ) -> dict[int, torch.Tensor]:
        """By member the Gram matrix [I, I] of what its text brings to this linear layer, its weight in it."""
        seen: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        grams: dict[int, torch.Tensor] = {}
        try:
            for number, run in enumerate(self.runs):
                gram = grams.setdefault(run.label, torch.zeros(linear.in_features, linear.in_features))
                for h_BSD, batch in texts(number):
                    block.self_attn(block.input_layernorm(h_BSD), rope)
                    add_gram(gram, seen.pop()[batch.mask], self.shares[number])
        finally:
            handle.remove()
        return grams

    def _solve(self, name: str, grams: dict[int, torch.Tensor]) -> torch.Tensor:
        """weight_OI of this name out of the members'."""
        return regress(
            self.source.mean_of(name),
            ((self.source.members[e].read(name), gram) for e, gram in grams.items()),
            self.source.shared.correlation,
        )


def regress(
    mean_OI: torch.Tensor, parts: Iterable[tuple[torch.Tensor, torch.Tensor]], correlation: float
) -> torch.Tensor:
    """The weight_OI of least squares over each member's (weight_OI, gram_II), solved as a change of their mean."""
    size = mean_OI.shape[1]
    total, wanted = (torch.zeros(size, n, dtype=torch.float64) for n in (size, mean_OI.shape[0]))
    for weight_OI, gram in parts:
        scaled = gram.double() * correlation
        scaled.diagonal().copy_(gram.diagonal())
        total += scaled
        wanted += scaled @ (weight_OI.double() - mean_OI.double()).T
    total.diagonal().add_(SMALLEST * total.diagonal().mean().clamp_min(1e-12))
    change: torch.Tensor = torch.linalg.solve(total, wanted).T
    return (mean_OI.double() + change).float()
