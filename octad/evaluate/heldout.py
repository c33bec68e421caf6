"""The held-out text that everybody is judged on: the same windows of the same documents, domain by domain.

    texts = read_texts(source, read_domains(Path("domains.yaml")), tokens=4096, window=512)
    texts.windows, texts.tokens["french"], texts.units("french").sums(nats)

What a contestant leaves behind is one number a predicted token, -ln p, in the order of these windows; everything else is
sums of it. The numbers of one document depend on each other, so a document is the unit that a bootstrap draws. A
domain of fewer than five documents is cut finer, into windows or into pieces of a window, and says so: its intervals
are then too narrow, as they cannot know how other documents differ.

Shapes: T predicted tokens of all windows, U units of one domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octad.checkpoint.load import load_tokenizer
from octad.checkpoint.source import TensorSource
from octad.errors import DataError
from octad.evaluate.domains import Domains
from octad.text.corpus import TextFiles
from octad.text.windows import Window, read_windows

Floats = NDArray[Any]
FEWEST_UNITS = 5  # to draw from; a domain with fewer documents is cut finer
PIECE = 8  # tokens of the finest unit


@dataclass(frozen=True)
class Units:
    """What a bootstrap draws in one domain: kind ("documents", "windows" or "pieces"), the unit of each of the domain's
    tokens, the bytes of each unit [U], and where the domain's tokens lie among all."""

    kind: str
    of_token: NDArray[np.intp]
    bytes: Floats
    span: slice

    def sums(self, nats_T: Floats) -> Floats:
        """Nats of each unit [U], in float64."""
        return np.bincount(self.of_token, nats_T[self.span].astype(np.float64), len(self.bytes))


@dataclass(frozen=True)
class Texts:
    """Windows by domain, in the domains' order."""

    domains: Mapping[str, list[Window]]

    @cached_property
    def windows(self) -> list[Window]:
        """All windows, domain after domain."""
        return [w for windows in self.domains.values() for w in windows]

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Where each domain's predicted tokens lie among all."""
        spans, start = {}, 0
        for name, count in self.tokens.items():
            spans[name], start = slice(start, start + count), start + count
        return spans

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Predicted tokens of each domain."""
        return {name: sum(len(w.ids) - 1 for w in windows) for name, windows in self.domains.items()}

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Bytes that those tokens stand for."""
        return {name: sum(w.predicted_bytes for w in windows) for name, windows in self.domains.items()}

    @property
    def total(self) -> int:
        """Predicted tokens of all domains: T."""
        return sum(self.tokens.values())

    @cached_property
    def starts(self) -> NDArray[np.intp]:
        """Where each window's tokens begin among all."""
        return np.cumsum([0, *(len(w.ids) - 1 for w in self.windows)])[:-1].astype(np.intp)

    @cached_property
    def units(self) -> dict[str, Units]:
        """What a bootstrap draws, by domain."""
        return {name: _units(windows, self.spans[name]) for name, windows in self.domains.items()}

    @cached_property
    def digest(self) -> str:
        """Of the ids and the cuts between windows: equal for equal work. Which domain a window is from plays no part."""
        flat = np.array([i for w in self.windows for i in (len(w.ids), *w.ids)], dtype=np.int64)
        return hashlib.sha256(flat.tobytes()).hexdigest()

    def facts(self) -> list[dict[str, Any]]:
        """For the report: name, documents, windows, tokens and bytes of each domain."""
        return [
            {
                "name": name,
                "documents": len({w.document for w in windows}),
                "windows": len(windows),
                "tokens": self.tokens[name],
                "bytes": self.bytes[name],
                "units": self.units[name].kind,
            }
            for name, windows in self.domains.items()
        ]


def read_texts(source: TensorSource, domains: Domains, *, tokens: int, window: int) -> Texts:
    """At most `tokens` tokens of each domain's files, in windows that the model's context holds. Raises DataError naming
    the domain."""
    tokenizer = load_tokenizer(source)
    window = min(window, source.config.max_position_embeddings)
    texts: dict[str, list[Window]] = {}
    for name, value in domains.items():
        text = value if isinstance(value, TextFiles) else TextFiles(value)
        try:
            texts[name] = read_windows(text.files, tokenizer, tokens=tokens, window=window, field=text.field)
        except DataError as error:
            raise DataError(f"domain {name!r}: {error}") from None
    return Texts(texts)


def _units(windows: Sequence[Window], span: slice) -> Units:
    """Documents; where there are too few, windows; where these are too few, pieces of PIECE tokens."""
    lengths = np.array([len(w.ids) - 1 for w in windows])
    window_of_token = np.repeat(np.arange(len(windows)), lengths)
    _, documents = np.unique([w.document for w in windows], return_inverse=True)
    sizes = np.array([w.predicted_bytes for w in windows], dtype=np.float64)
    if documents.max() + 1 >= FEWEST_UNITS:
        return Units("documents", documents[window_of_token], np.bincount(documents, sizes), span)
    if len(windows) >= FEWEST_UNITS:
        return Units("windows", window_of_token, sizes, span)
    place = np.concatenate([np.arange(n) // PIECE for n in lengths])
    _, pieces = np.unique(window_of_token * (place.max() + 1) + place, return_inverse=True)
    per_token = (sizes / lengths)[window_of_token]  # a window's bytes, spread evenly over its tokens
    return Units("pieces", pieces, np.bincount(pieces, per_token), span)
