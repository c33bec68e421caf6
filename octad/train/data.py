"""What a training step eats: windows of packed documents, drawn from weighted sources in a fixed order.

    stream = Stream([Source("french", shard, weight=1.0)], window=512, seed=0)
    batch = stream.next(8)                        # tokens_BS, targets_BS, documents_BS, sources_B
    stream.state_dict(); stream.load_state_dict(state)

Within an epoch a source's documents lie one after another in a shuffled order, cut into windows that are shuffled in
turn; each token is a target once. The next source is the one that is furthest behind its weight, so shares are exact at
every moment. All of it is a function of the seed and of how many windows each source has given: that count is the whole
position, and restoring it is exact on any number of ranks.

Shapes: B windows, S positions of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octad.errors import DataError
from octad.train.shards import Shard

IGNORED = -100  # a target that is not learnt


@dataclass(frozen=True)
class Batch:
    """tokens_BS and the targets_BS one place later (IGNORED where not learnt), documents_BS (which document of its
    window a token lies in), sources_B, and the identity of each window: (source, number)."""

    tokens: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor
    sources: torch.Tensor
    windows: tuple[tuple[str, int], ...]

    def split(self, size: int) -> list[Batch]:
        """The same windows in pieces of at most `size`."""
        return [self._piece(slice(start, start + size)) for start in range(0, len(self.tokens), size)]

    def to(self, device: torch.device | str) -> Batch:
        """The same with the model's inputs on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            documents=self.documents.to(device),
        )

    @property
    def learnt(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def _piece(self, at: slice) -> Batch:
        documents, sources = self.documents[at], self.sources[at]
        return Batch(self.tokens[at], self.targets[at], documents, sources, self.windows[at])


class Source:
    """One domain's shard, and how often it is drawn relative to the others."""

    def __init__(self, name: str, shard: Shard, weight: float = 1.0) -> None:
        self.name, self.shard, self.weight = name, shard, weight


class Stream:
    """Endless windows over weighted sources. Raises DataError where a source has too little text for one window."""

    def __init__(
        self, sources: Sequence[Source], *, window: int, seed: int = 0, document_mask: bool = True
    ) -> None:
        self.sources, self.window, self.document_mask = list(sources), window, document_mask
        self.packed = [_Packed(source, window, seed + 7919 * n) for n, source in enumerate(sources)]
        self.taken = [0] * len(self.sources)

    def next(self, count: int) -> Batch:
        """The next `count` windows."""
        rows, numbers, names = [], [], []
        for _ in range(count):
            n = self._due()
            rows.append(self.packed[n].window_at(self.taken[n]))
            names.append((self.sources[n].name, self.taken[n]))
            numbers.append(n)
            self.taken[n] += 1
        tokens, documents, learn = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        targets = tokens[:, 1:].masked_fill(~learn[:, 1:], IGNORED)
        if self.document_mask:  # the first token of a document cannot be told from the one before it
            targets = targets.masked_fill(documents[:, 1:] != documents[:, :-1], IGNORED)
        return Batch(tokens[:, :-1], targets, documents[:, :-1], torch.tensor(numbers), tuple(names))

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as plain data."""
        return {"taken": {source.name: n for source, n in zip(self.sources, self.taken, strict=True)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that state_dict told. Raises DataError for another set of sources."""
        names = [source.name for source in self.sources]
        if sorted(state["taken"]) != sorted(names):
            raise DataError(f"the run has sources {', '.join(state['taken'])}, found {', '.join(names)}")
        self.taken = [int(state["taken"][name]) for name in names]

    def _due(self) -> int:
        """The source that is furthest behind its share."""
        total, weights = sum(self.taken) + 1, [source.weight for source in self.sources]
        behind = [w / sum(weights) * total - n for w, n in zip(weights, self.taken, strict=True)]
        return max(range(len(behind)), key=behind.__getitem__)


class _Packed:
    """Window k of a source, for every k: the documents of epoch k // windows in their shuffled order."""

    def __init__(self, source: Source, window: int, seed: int) -> None:
        self.shard, self.window, self.seed = source.shard, window, seed
        self.count = (len(self.shard.tokens) - 1) // window
        if self.count < 1:
            raise DataError(
                f"{self.shard.label}: has {len(self.shard.tokens)} tokens, one window needs {window + 1}; "
                "give more text or a shorter window"
            )
        self.epoch = -1

    def window_at(self, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Its S + 1 tokens, the number of each one's document, and which of them are learnt."""
        self._enter(k // self.count)
        start = int(self.windows[k % self.count]) * self.window
        end = start + self.window + 1
        places: list[npt.NDArray[np.int64]] = []
        documents: list[npt.NDArray[np.int64]] = []
        document = int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            original, stop = self.order[document], min(end, int(self.ends[document]))
            offset = int(self.shard.starts[original + 1]) - int(self.ends[document])
            places.append(np.arange(start + offset, stop + offset))
            documents.append(np.full(stop - start, len(documents)))
            start, document = stop, document + 1
        place = np.concatenate(places)
        learn = np.ones(len(place), np.bool_) if self.shard.learn is None else self.shard.learn[place]
        return self.shard.tokens[place].astype(np.int64), np.concatenate(documents), learn

    def _enter(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        random = np.random.default_rng((self.seed, epoch))
        lengths = np.diff(self.shard.starts)
        self.order = random.permutation(len(lengths))
        self.ends = np.cumsum(lengths[self.order])
        self.windows = random.permutation(self.count)
        self.epoch = epoch
