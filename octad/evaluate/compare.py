"""The first comparison: the mixture beside everything it is made of, in bits per byte of held-out text.

    comparison = compare(source, domains, tokens=4096, window=512)
    comparison.bits["mixture top-2"]["french"], comparison.mean("oracle"), comparison.load["french"]

Contestants see the same tokens in the same windows: every member, the soup (mean of the members that are not the base),
the mixture at top-1, top-2 and its own top-k, and the oracle, which is the best member of each domain, told the domain.
A member that the mixture does not hold exactly is opened where it came from, and judged as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from octad.checkpoint.load import load_model, load_tokenizer
from octad.checkpoint.provenance import Provenance
from octad.checkpoint.source import TensorSource
from octad.checkpoint.text import Window, read_windows
from octad.dist import compute_dtype
from octad.errors import DataError, OctadError
from octad.evaluate.contestants import Contestant, Member, Original, Soup, TopK, contestant, counted_load
from octad.evaluate.loss import bits_per_byte, nats_per_token, window_nats
from octad.evaluate.originals import original
from octad.model.transformer import Transformer

Domains = Mapping[str, Sequence[Path]]
Progress = Callable[[str, float], None]


@dataclass
class Comparison:
    """bits[contestant][domain] in bits per byte, nats the same in nats per token, load[domain] the mixture's shares.

    inexact: members that the mixture does not hold exactly, judged as they were before; as_held: those of them that are
    judged as the mixture holds them, with its attention, and why."""

    model: str
    domains: list[str]
    members: list[str]
    mixtures: list[str]
    inexact: list[str]
    as_held: dict[str, str]
    tokens: dict[str, int]
    bits: dict[str, dict[str, float]] = field(default_factory=dict)
    nats: dict[str, dict[str, float]] = field(default_factory=dict)
    load: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, name: str, measure: str = "bits") -> float:
        """Mean over the domains, each counted once."""
        values = (self.bits if measure == "bits" else self.nats)[name].values()
        return sum(values) / len(values)

    def add_oracle(self) -> None:
        """The contestant that takes the best member of each domain."""
        for table in (self.bits, self.nats):
            table["oracle"] = {d: min(table[m][d] for m in self.members) for d in self.domains}

    def to_dict(self) -> dict[str, Any]:
        """Everything, with the means, for JSON."""
        means = {
            name: {"bits_per_byte": self.mean(name), "nats_per_token": self.mean(name, "nats")}
            for name in self.bits
        }
        return {**self.__dict__, "mean": means}


def read_domains(path: Path) -> dict[str, list[Path]]:
    """A YAML file `domains: {name: file or [files]}`; paths are relative to it. Raises DataError with one line."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    table = raw.get("domains") if isinstance(raw, dict) else None
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path}: expected 'domains:' with a file for each domain name")
    files: dict[str, list[Path]] = {}
    for name, value in table.items():
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(v, str) for v in listed) or not listed:
            raise DataError(f"{path}: domain {name!r}: expected a file or a list of files, found {value!r}")
        files[str(name)] = [path.parent / v for v in listed]
    return files


def compare(
    source: TensorSource,
    domains: Domains,
    *,
    tokens: int = 4096,
    window: int = 512,
    progress: Progress = lambda stage, done: None,
) -> Comparison:
    """Judge a mixture and its parts, or a dense model alone, on `tokens` held-out tokens a domain."""
    tokenizer = load_tokenizer(source)
    window = min(window, source.config.max_position_embeddings)
    texts = {name: _windows(name, files, tokenizer, tokens, window) for name, files in domains.items()}
    names, made = named_experts(source)
    originals, as_held = find_originals(made, texts)
    model = load_model(source, compute_dtype())
    field_of = contestants(model, names, made, originals)
    members = [n for n in names if n in field_of]
    result = Comparison(
        source.label,
        list(texts),
        members,
        [n for n, who in field_of.items() if isinstance(who, TopK)],
        [record["name"] for record in made.experts if not record.get("exact")] if made else [],
        as_held,
        {name: sum(len(w.ids) - 1 for w in windows) for name, windows in texts.items()},
    )
    total = sum(result.tokens.values()) * max(1, len(field_of))
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("judging", min(1.0, done / total))

    for name, who in field_of.items() or {"model": None}.items():
        _judge(result, model, name, who, texts, tick)
    if members:
        result.add_oracle()
    return result


def _windows(name: str, files: Sequence[Path], tokenizer: Any, tokens: int, window: int) -> list[Window]:
    try:
        return read_windows(files, tokenizer, tokens=tokens, window=window)
    except DataError as error:
        raise DataError(f"domain {name!r}: {error}") from None


def _judge(
    result: Comparison,
    model: Transformer,
    name: str,
    who: Contestant | None,
    texts: Mapping[str, list[Window]],
    tick: Callable[[int], None],
) -> None:
    """Fill in one contestant's row; the mixture at its own top-k also tells its load, domain by domain."""
    if isinstance(who, TopK) and who.k == model.config.num_experts_per_tok:
        nats: list[float] = []
        for domain, windows in texts.items():
            with counted_load(model) as load:
                nats += window_nats(model, windows, progress=tick, before=load.set_mask)
            shares = torch.stack([count / count.sum() for count in load.counts]).mean(0)
            result.load[domain] = [round(float(s), 4) for s in shares]
    else:
        together = [w for windows in texts.values() for w in windows]  # large batches cost less per token
        with contestant(model, who) as judged:
            nats = window_nats(judged, together, progress=tick)
    start = 0
    for domain, windows in texts.items():
        part = nats[start : start + len(windows)]
        result.bits.setdefault(name, {})[domain] = bits_per_byte(part, windows)
        result.nats.setdefault(name, {})[domain] = nats_per_token(part, windows)
        start += len(windows)


def contestants(
    model: Transformer, names: Sequence[str], made: Provenance | None, originals: Mapping[str, TensorSource]
) -> dict[str, Contestant]:
    """Who takes part; none for a dense model."""
    config = model.config
    if not config.is_moe:
        return {}
    table: dict[str, Contestant] = {
        name: Original(originals[name]) if name in originals else Member(e) for e, name in enumerate(names)
    }
    specialists = [e for e, record in enumerate(made.experts if made else []) if record.get("kind") != "base"]
    table["soup"] = Soup(tuple(specialists or range(len(names))))
    ks = sorted({1, min(2, config.num_experts), config.num_experts_per_tok})
    return table | {f"mixture top-{k}": TopK(k) for k in ks}


def named_experts(source: TensorSource) -> tuple[list[str], Provenance | None]:
    """The experts' names, from octad.json where octad made the mixture (then also that), else 'expert 0', 'expert 1', ...

    Raises CheckpointError for a damaged octad.json."""
    made = Provenance.of(source) if source.config.is_moe else None
    return (made.names if made else [f"expert {e}" for e in range(source.config.num_experts)]), made


def find_originals(
    made: Provenance | None, texts: Mapping[str, list[Window]]
) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Of the members that the mixture does not hold exactly: those found where they lay, and why not, the others."""
    found: dict[str, TensorSource] = {}
    reasons: dict[str, str] = {}
    if made is None:
        return found, reasons
    largest = max(max(window.ids) for windows in texts.values() for window in windows)
    for name, record in zip(made.names, made.experts, strict=True):
        if record.get("exact"):
            continue
        try:
            source = original(made, record)
        except OctadError as error:
            reasons[name] = str(error)
            continue
        if source.config.vocab_size > largest:
            found[name] = source
        else:
            reasons[name] = "the texts have tokens that another member added"
    return found, reasons
