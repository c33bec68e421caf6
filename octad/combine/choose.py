"""shared: auto: which way to share attention loses least of these members, measured on text held out for it.

    spec, why = choose(plan, distances)          # SharedSpec(method="regmean"), "shared: auto: regmean: ..."

Each expert's text runs through the shared part of every candidate and the expert's own networks, layer by layer, as in
the calibration pass; so routers have no part in it, and it can be told before there are any. Beside them the members
themselves read it. A quarter of the documents judges, RegMean sees the others. Attention made of all members costs
something, since no expert can then change without the others: it is taken where it is better than the base's for certain.

Shapes: B sequences, S positions, N tokens, V vocabulary, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from octad.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD
from octad.checkpoint.source import TensorSource
from octad.combine.calibrate import Run, Texts, gate_inputs
from octad.combine.calibration import text_windows
from octad.combine.distances import Distances
from octad.combine.layer_parts import dense_mlp, expert_names, forget, read_all
from octad.combine.mixture import MixtureSource
from octad.combine.recipe import RefitSpec, SharedSpec
from octad.combine.refit import HELD_OUT, fit_and_choose
from octad.combine.regmean import Regression
from octad.dist import compute_dtype
from octad.figures import change
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer
from octad.text.windows import Window

if TYPE_CHECKING:
    from octad.combine.preflight import Plan

CANDIDATES = ("base", "mean", "ties", "dare", "regmean")
JUDGED = 1024  # tokens of each expert's text, about
HEAD_ROWS = 64  # whose logits exist at one time
CERTAIN = 2.0  # standard errors
Nats = list[
    torch.Tensor
]  # of each expert: of its windows, [windows, 2]: sum of -ln p, and how many were predicted


def choose(plan: Plan, found: Sequence[Distances]) -> tuple[SharedSpec, str]:
    """The spec to combine with, and a sentence that says why. Raises DataError, CheckpointError."""
    given = plan.recipe.shared

    def spec(method: str) -> SharedSpec:
        return SharedSpec.checked(given.model_dump() | {"method": method}, "shared")

    if all(d.same_shared_part for d in found):
        return spec(
            "base"
        ), "shared: auto: base: every member's attention, norms and embeddings are the base's"
    if any(report.other_arithmetic for report in plan.reports):
        return spec(
            "base"
        ), "shared: auto: base: members differ in more than weights (see above), and cannot be averaged"
    weighted = len(set(plan.source().weights)) > 1
    names = ["linear" if weighted and name == "mean" else name for name in CANDIDATES]
    texts = held_texts(plan)
    dtype = compute_dtype()
    nats = {name: own_nats(plan.source(spec(name)), texts, dtype) for name in names}
    members = [own_nats(alone(plan, e), [texts[e]], dtype)[0] for e in range(len(plan.members))]
    best = decide(nats)
    return spec(best), in_words(best, nats, members)


@dataclass(frozen=True)
class Held:
    """One expert's text: what RegMean may see, and what judges."""

    seen: list[Window]
    judging: list[Window]


def held_texts(plan: Plan) -> list[Held]:
    """Of every expert; of a text that is a single window, that."""
    found = []
    for spec in plan.recipe.experts:
        files = [plan.recipe.resolve(name) for name in spec.data]
        budget = RefitSpec(tokens=HELD_OUT * JUDGED, window=JUDGED // 8)
        windows = text_windows(spec, files, budget, plan.tokenizer)
        seen, judging = fit_and_choose(windows)
        found.append(Held(seen or windows, judging or windows))
    return found


def alone(plan: Plan, e: int) -> MixtureSource:
    """A mixture of one member alone, on its own shared part: the member itself."""
    member = plan.members[e]
    config = replace(plan.config, num_experts=1, num_experts_per_tok=1, vocab_size=member.config.vocab_size)
    return MixtureSource(config, member, [member], SharedSpec(), dtype=plan.dtype)


def own_nats(source: MixtureSource, texts: Sequence[Held], dtype: torch.dtype) -> Nats:
    """What each expert's judging text costs when it goes through that expert."""
    runs = [Run(e, e, text.judging) for e, text in enumerate(texts)]
    regression = None
    if source.shared.method == "regmean":
        seeing = [Run(e, e, text.seen) for e, text in enumerate(texts)]
        regression, runs = Regression(source, seeing, dtype), [*seeing, *runs]
    ear = Ear(source, runs, dtype, first=len(runs) - len(texts))

    def drop(name: str, tensor: torch.Tensor, first: int = 0) -> None:
        source.settled.pop(name, None)

    settle = regression.settle if regression else None
    for _ in gate_inputs(source, runs, dtype, drop if regression else forget, settle, ear.hear):
        pass
    return [ear.nats[number] for number in range(ear.first, len(runs))]


class Ear:
    """Listens at the last layer of a calibration pass: nats[number of the run] of runs from `first` on."""

    def __init__(self, source: TensorSource, runs: Sequence[Run], dtype: torch.dtype, first: int) -> None:
        self.source, self.runs, self.dtype, self.first = source, runs, dtype, first
        self.nats: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def hear(self, layer: int, path: int, block: DecoderLayer, rope: Rope, texts: Texts) -> None:
        """Finish what goes through this expert, and keep what it costs."""
        config = self.source.config
        if layer < config.num_hidden_layers - 1:
            return
        mlp = dense_mlp(config, read_all(self.source, expert_names(config, layer, path), self.dtype, forget))
        norm_D = self.source.read(FINAL_NORM).to(self.dtype)
        head_VD = self.source.read(EMBEDDING if config.tie_word_embeddings else HEAD).to(self.dtype)
        for number in range(self.first, len(self.runs)):
            if self.runs[number].path != path:
                continue
            costs = []
            for h_BSD, batch in texts(number):
                mid_BSD = block.attend(h_BSD, rope)
                out_BSD = mid_BSD + mlp(block.post_attention_layernorm(mid_BSD))
                x_BSD = F.rms_norm(out_BSD, norm_D.shape, norm_D, config.rms_norm_eps)
                for x_SD, window in zip(x_BSD, batch.windows, strict=True):
                    ids = torch.tensor(window.ids)
                    costs.append((loss(x_SD[: len(ids) - 1], ids[1:], head_VD), float(len(ids) - 1)))
            self.nats[number] = torch.tensor(costs)


def loss(x_ND: torch.Tensor, targets_N: torch.Tensor, head_VD: torch.Tensor) -> float:
    """The sum of -ln p of the targets."""
    parts = zip(torch.split(x_ND, HEAD_ROWS), torch.split(targets_N, HEAD_ROWS), strict=True)
    return sum(float(F.cross_entropy((x @ head_VD.T).float(), t, reduction="sum")) for x, t in parts)


def decide(nats: dict[str, Nats]) -> str:
    """The best in the mean over experts, if it is better than the base's for certain; else base."""
    best = min(nats, key=lambda name: per_token(nats[name]))
    value, error = difference(nats[best], nats["base"])
    return best if best == "base" or value + CERTAIN * error < 0 else "base"


def difference(ours: Nats, theirs: Nats) -> tuple[float, float]:
    """Nats a token more, mean over experts, and the standard error of that over windows (a ratio's, by linearisation)."""
    values, variances = [], []
    for own, other in zip(ours, theirs, strict=True):
        more, counts = own[:, 0] - other[:, 0], own[:, 1]
        mean = float(more.sum() / counts.sum())
        n = len(counts)
        spread = (more - mean * counts).square().sum() * n / max(1, n - 1)
        values.append(mean)
        variances.append(float(spread / counts.sum().square()) if n > 1 else mean * mean)
    return sum(values) / len(values), sum(variances) ** 0.5 / len(values)


def per_token(nats: Nats) -> float:
    """Mean over experts of nats a token."""
    return sum(float(n[:, 0].sum() / n[:, 1].sum()) for n in nats) / len(nats)


def in_words(best: str, nats: dict[str, Nats], members: Nats) -> str:
    """What was measured, and why this one is taken."""
    own = per_token(members)
    behind = ", ".join(f"{name} {change(per_token(found) / own - 1, 1)}" for name, found in nats.items())
    tokens = sum(int(n[:, 1].sum()) for n in members)
    least = min(nats, key=lambda name: per_token(nats[name]))
    if best != "base":
        why = f"{best} is better than the base's attention for certain"
    elif least == "base":
        why = "base loses least"
    else:
        why = f"{least} is not for certain better than base, with which experts are the easier to change"
    return (
        f"shared: auto: {best}: on {tokens:,} held-out tokens, each text through its own expert, more nats than the"
        f" members themselves: {behind}; {why}"
    )
