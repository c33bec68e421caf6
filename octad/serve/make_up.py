"""What a mixture is made of, for the page's panel: octad.json's facts, the experts' distances, the verdict's sentence.

    make_up(open_source("mixture"))     # {"base", "router", "experts": [{"name", "model", "distance"}], "verdict", ...}

Distances are the mixture's own: ||W - B|| / ||B|| over an expert's feed-forward net, averaged over layers, where B is
the expert that is the base itself, or, without one, the experts' average. They are taken on BLOCKS evenly spaced runs of
BLOCK values of each projection in at most LAYERS layers, so that a model of any size takes a moment; weights that do not
lie on disk as they are (quantised, GGUF) are left out. Nothing tells where anything lies on this machine.

Shapes: E experts, N values looked at.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from statistics import fmean
from typing import Any

import torch

from octad.checkpoint.distance import compared_layers, ffn_names
from octad.checkpoint.names import PARTS
from octad.checkpoint.provenance import Provenance
from octad.checkpoint.source import TensorSource
from octad.model.cost import parameters

LAYERS, BLOCKS, BLOCK = 8, 16, 1 << 12
VERDICT = re.compile(r"<!-- octad verdict: \d+ tokens -->\s*## Verdict\s*\*\*(.+?)\*\*")


def make_up(source: TensorSource) -> dict[str, Any] | None:
    """Plain data for /v1/experts; None for a dense model. What is not known is left out.

    Raises CheckpointError for a damaged octad.json and for weights that cannot be read."""
    if not source.config.is_moe:
        return None
    made = Provenance.of(source)
    rows: list[dict[str, Any]] = [_member(record) for record in made.experts] if made else []
    distances = expert_distances(source, _base_expert(made))
    if distances is not None:
        rows = rows or [{} for _ in distances]
        for row, distance in zip(rows, distances, strict=True):
            row["distance"] = round(distance, 5)
    facts = {
        "base": _shown(str(made.recipe.get("base", ""))) if made else None,
        "family": source.config.model_type,
        "parameters": parameters(source.config),
        "active_parameters": parameters(source.config, active=True),
        "router": made.method("router") if made else None,
        "shared": made.method("shared") if made else None,
        "distance_from": "the base" if _base_expert(made) is not None else "the experts’ average",
        "experts": rows,
        "edits": made.edits if made else [],
        "verdict": _verdict(source),
    }
    return {name: value for name, value in facts.items() if value not in (None, "", [])}


def expert_distances(source: TensorSource, reference: int | None) -> list[float] | None:
    """How far each expert's feed-forward net is from that of expert `reference` (None: from the average of all), [E];
    None where the weights do not lie on disk as they are."""
    layers = compared_layers(source.config)
    by_layer = []
    for layer in layers[:: -(-len(layers) // LAYERS)]:
        squares = norms = torch.zeros(())
        for part in PARTS:
            found = [_some_values(source, name) for name in ffn_names(source.config, layer, part)]
            if any(values is None for values in found):
                return None
            values_EN = torch.stack([values for values in found if values is not None])
            base_N = values_EN.mean(0) if reference is None else values_EN[reference]
            squares = squares + (values_EN - base_N).square().sum(1)
            norms = norms + base_N.square().sum()
        by_layer.append((squares / norms).sqrt().nan_to_num().tolist())
    return [fmean(values) for values in zip(*by_layer, strict=True)]


def _some_values(source: TensorSource, name: str) -> torch.Tensor | None:
    """Evenly spaced values of a tensor, [N] in float64, or all of a small one."""
    extent = source.extent(name)
    if extent is None or not extent.info.dtype.is_floating_point:
        return None
    count = extent.info.numel
    if count <= BLOCKS * BLOCK:
        return extent.read().reshape(-1).double()
    starts = [place * (count - BLOCK) // (BLOCKS - 1) for place in range(BLOCKS)]
    return extent.blocks(starts, BLOCK).reshape(-1).double()


def _base_expert(made: Provenance | None) -> int | None:
    """The number of the expert that is the base itself."""
    records = made.experts if made else []
    return next((e for e, record in enumerate(records) if record.get("kind") == "base"), None)


def _member(record: dict[str, Any]) -> dict[str, Any]:
    kept = {key: record[key] for key in ("name", "kind", "exact", "tokens") if record.get(key) is not None}
    held = record.get("held")
    lacks = held.get("sentence") if isinstance(held, dict) and not record.get("exact") else None
    kept |= {"lacks": str(lacks)} if lacks else {}
    return kept | ({"model": _shown(str(record["model"]))} if record.get("model") else {})


def _shown(reference: str) -> str:
    """A member as the recipe calls it; of a place on this machine only the last part."""
    path = PurePath(reference)
    local = path.is_absolute() or reference.startswith((".", "~")) or len(path.parts) > 2
    return path.name if local else reference


def _verdict(source: TensorSource) -> dict[str, str] | None:
    """The headline that `octad evaluate` left in the model card."""
    card = source.directory / "README.md" if source.directory is not None else None
    try:
        text = card.read_text(encoding="utf-8") if card is not None else ""
    except (OSError, UnicodeDecodeError):
        return None
    found = VERDICT.search(text)
    return {"headline": found[1]} if found else None
