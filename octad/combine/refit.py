"""Closed-form repair: attention and the experts' down_proj fitted anew, so that each layer gives what its member would
give.

    with Refit(source, texts, dtype, first=len(runs)) as repair:          # texts: windows of each member's own text
        for step in gate_inputs(source, [*runs, *repair.runs], dtype, write, repair.settle, repair.refit): ...

A member whose attention is not the mixture's finds states there that its networks were not trained on, and every layer
adds to that. So its text runs twice, layer by layer: through the member itself, and through the mixture by the member's
expert, with all that was fitted before. What the second lacks of the first is regressed (ridge) on what goes in: of q,
k and v what they give, of all members together; then, behind them, of o_proj the residual stream, again together; then,
behind that, of each expert's down_proj the residual stream. There an error counts by the size of the state that it is
in, since the next norm divides by that. A quarter of the documents is left out to choose the ridge's strength by, for
each matrix, or that it stays as it is; then they count too. No gradient, and one layer in memory.

Shapes: B sequences, S positions, N tokens, D model, F feed-forward hidden, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import nn

from octad.checkpoint.names import PARTS, dense_mlp_name
from octad.combine.calibrate import BATCH_TOKENS, Run, Texts
from octad.combine.layer_parts import (
    dense_mlp,
    embedded,
    expert_names,
    forget,
    read_all,
    shared_block,
    shared_names,
)
from octad.combine.mixture import MixtureSource
from octad.combine.states import States
from octad.model.rope import Rope
from octad.model.transformer import DecoderLayer
from octad.text.windows import Batch, Window, batches

STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-4)  # of the ridge, as a share of each input's own mean square
HELD_OUT = 4  # one document in so many chooses the strength
TRIED = 64  # outputs that the strengths are tried on
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))  # of one input each, in the order of the work
DOWN_PROJ = "down_proj.weight"


class Refit:
    """Gives a source's `settled` the new weights, in the calibration pass. `first`: the number of its first run there."""

    def __init__(
        self, source: MixtureSource, texts: Sequence[Sequence[Window]], dtype: torch.dtype, first: int = 0
    ) -> None:
        self.source, self.dtype, self.first = source, dtype, first
        self.runs: list[Run] = []
        self.held: list[bool] = []
        for e, windows in enumerate(texts):
            for held, part in enumerate(fit_and_choose(windows)):
                if part:
                    self.runs.append(Run(e, e, part))
                    self.held.append(bool(held))
        self._mass = {run.label: 0.0 for run in self.runs}
        for run in self.runs:
            self._mass[run.label] += run.mass()
        self._norms: dict[int, nn.Module] = {}  # of each member in this layer: what its networks read

    def __enter__(self) -> Self:
        parts = [list(batches(run.windows, BATCH_TOKENS)) for run in self.runs]
        tokens = sum(batch.tokens.numel() for part in parts for batch in part)
        self._own = States(tokens * self.source.config.hidden_size * self.dtype.itemsize)
        self._places: list[list[int]] = []
        for run, part in zip(self.runs, parts, strict=True):
            embed = embedded(self.source.members[run.label], part, self.dtype)
            self._places.append([self._own.append(embed(batch)) for batch in part])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._own.__exit__(kind, error, trace)

    @torch.no_grad()
    def settle(self, layer: int, rope: Rope, texts: Texts) -> None:
        """Give the source this layer's attention, and take the members' own streams through theirs."""
        names = shared_names(self.source.config, layer)
        tensors = read_all(self.source, names, self.dtype, forget)
        for group in GROUPS:
            block = shared_block(self.source.config, layer, tensors)
            keys = [f"self_attn.{part}.weight" for part in group]
            sums = Sums(tensors[keys[0]].shape[1], sum(len(tensors[key]) for key in keys))
            for e in self._mass:
                own, own_rope = self._member(e, layer)
                self._norms[e] = own.post_attention_layernorm
                for number, h_BSD, batch, place in self._batches(e, texts):
                    seen = (
                        self._projected(block, own, h_BSD, place, batch)
                        if len(group) > 1
                        else self._attended(block, own, h_BSD, place, batch, rope, own_rope)
                    )
                    sums.add(self.held[number], *seen, self.source.weights[e] / self._mass[e])
            if (change_OI := sums.change()) is not None:
                for key, change in zip(
                    keys, torch.split(change_OI, [len(tensors[k]) for k in keys]), strict=True
                ):
                    settled = self.source.settled[names[key]] = tensors[key].float() + change
                    tensors[key] = settled.to(self.dtype)

    def _projected(
        self, block: DecoderLayer, own: DecoderLayer, h_BSD: torch.Tensor, place: int, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of q, k and v beside each other: what goes in, what is lacking, and that all rows count alike."""
        x_ND = block.input_layernorm(h_BSD)[batch.mask]
        wanted = torch.cat(
            tuple(own.self_attn.project(own.input_layernorm(self._own[place])[batch.mask])), -1
        )
        found = torch.cat(tuple(block.self_attn.project(x_ND)), -1)
        return x_ND, wanted.float() - found.float(), torch.ones(len(x_ND))

    def _attended(
        self,
        block: DecoderLayer,
        own: DecoderLayer,
        h_BSD: torch.Tensor,
        place: int,
        batch: Batch,
        rope: Rope,
        own_rope: Rope,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of o_proj: see rows; the member's own states go on."""
        wanted_BSD = self._own[place] = own.attend(self._own[place], own_rope)
        with inputs_of(block.self_attn.o_proj) as seen:
            found_BSD = block.attend(h_BSD, rope)
        return rows(seen[0], found_BSD, wanted_BSD, batch)

    def _member(self, e: int, layer: int) -> tuple[DecoderLayer, Rope]:
        """A member's own shared part of a layer, and its positions."""
        member = self.source.members[e]
        names = shared_names(self.source.config, layer)
        tensors = read_all(member, names, self.dtype, forget)
        return shared_block(member.config, layer, tensors), Rope(member.config)

    @torch.no_grad()
    def refit(self, layer: int, expert: int, block: DecoderLayer, rope: Rope, texts: Texts) -> None:
        """Give the source this expert's down_proj, and take its member's own stream through its network."""
        config, member = self.source.config, self.source.members[expert]
        if expert not in self._norms:
            return
        names = expert_names(config, layer, expert)
        mlp = dense_mlp(config, read_all(self.source, names, self.dtype, forget))
        theirs = {f"{part}_proj.weight": dense_mlp_name(layer, part) for part in PARTS}
        own, norm = dense_mlp(config, read_all(member, theirs, self.dtype, forget)), self._norms.pop(expert)
        sums = Sums(mlp.down_proj.in_features, mlp.down_proj.out_features)
        for number, h_BSD, batch, place in self._batches(expert, texts):
            state_BSD = self._own[place]
            wanted_BSD = self._own[place] = state_BSD + own(norm(state_BSD))
            h_BSD = block.attend(h_BSD, rope)
            with inputs_of(mlp.down_proj) as seen:
                found_BSD = h_BSD + mlp(block.post_attention_layernorm(h_BSD))
            sums.add(self.held[number], *rows(seen[0], found_BSD, wanted_BSD, batch))
        if (change_OI := sums.change()) is not None:
            self.source.settled[names[DOWN_PROJ]] = mlp.down_proj.weight.float() + change_OI

    def _batches(self, expert: int, texts: Texts) -> Iterator[tuple[int, torch.Tensor, Batch, int]]:
        """Of an expert's runs: number, the mixture's states, the batch, and where the member's own states are."""
        for number, run in enumerate(self.runs):
            if run.label == expert:
                pairs = zip(texts(self.first + number), self._places[number], strict=True)
                yield from ((number, h_BSD, batch, place) for (h_BSD, batch), place in pairs)


class Sums:
    """What a ridge needs of its rows, those to fit on and those held out: gram_2II, cross_2IO, square_2O."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = torch.zeros(2, inputs, inputs)
        self.cross = torch.zeros(2, inputs, outputs)
        self.square = torch.zeros(2, outputs)

    def add(
        self,
        held: bool,
        x_NI: torch.Tensor,
        missing_NO: torch.Tensor,
        weight_N: torch.Tensor,
        share: float = 1.0,
    ) -> None:
        """Count rows in: inputs, what the outputs lack, and how much each row's error counts."""
        root_N1 = (share * weight_N).sqrt()[:, None]
        x, missing = x_NI.float() * root_N1, missing_NO.float() * root_N1
        self.gram[int(held)].addmm_(x.T, x)
        self.cross[int(held)].addmm_(x.T, missing)
        self.square[int(held)].add_(missing.square().sum(0))

    def change(self) -> torch.Tensor | None:
        """change_OI, float32, to add to the weight; None where no change is better on what was held out."""
        strength = self._strength()
        if strength is None:
            return None
        change: torch.Tensor = ridge(self.gram.sum(0), self.cross.sum(0), strength).T.float()
        return change

    def _strength(self) -> float | None:
        """The strength that leaves least of the held-out errors, relative to each output's; None: no change does. From
        the strongest on, until a weaker one is worse: what is lost by noise only grows from there."""
        some = slice(None, None, max(1, self.cross.shape[2] // TRIED))
        cross, square = self.cross[1, :, some], self.square[1, some]
        there = square > 0
        best, chosen = 0.0, None
        if bool(there.any()) and bool(self.square[0].any()):
            for strength in STRENGTHS:
                change_IO = ridge(self.gram[0], self.cross[0, :, some], strength).float()
                error_O = (change_IO * (self.gram[1] @ change_IO - 2 * cross)).sum(0)
                less = float((error_O[there] / square[there]).mean())
                if less >= best:
                    break
                best, chosen = less, strength
        return chosen


def ridge(gram_II: torch.Tensor, cross_IO: torch.Tensor, strength: float) -> torch.Tensor:
    """The change_IO of least squares with a penalty of `strength` times each input's own square sum, in float64."""
    gram = gram_II.double()
    squares = gram.diagonal()
    gram.diagonal().add_(strength * squares + 1e-9 * squares.mean() + 1e-30)
    return torch.cholesky_solve(cross_IO.double(), torch.linalg.cholesky(gram))


def rows(
    x_BSI: torch.Tensor, found_BSD: torch.Tensor, wanted_BSD: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a batch's real tokens: inputs, what the states found lack of those wanted, and one over the wanted ones' mean
    square."""
    wanted_ND = wanted_BSD[batch.mask].float()
    weight_N = 1 / wanted_ND.square().mean(1).clamp_min(1e-12)
    return x_BSI[batch.mask], wanted_ND - found_BSD[batch.mask].float(), weight_N


def fit_and_choose(windows: Sequence[Window]) -> tuple[list[Window], list[Window]]:
    """Those to fit on and those held out: whole documents, where there are enough of them."""
    documents = list(dict.fromkeys(window.document for window in windows))
    if len(documents) < HELD_OUT:
        held = list(windows[HELD_OUT - 1 :: HELD_OUT]) or list(windows[1:][-1:])
        return [window for window in windows if window not in held], held
    out = set(documents[HELD_OUT - 1 :: HELD_OUT])
    return [w for w in windows if w.document not in out], [w for w in windows if w.document in out]


@contextmanager
def inputs_of(linear: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """What goes into a linear layer inside the block, call by call."""
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
