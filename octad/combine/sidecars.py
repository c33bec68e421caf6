"""What a combined checkpoint carries besides weights: octad.json, the router statistics, and a model card.

    octad.json                      recipe and members, with the hashes of their files (checkpoint/provenance.py)
    router_statistics.octad   calibration tokens, and for ridge the means and summed grams (statistics.py)
    README.md                 the model card: how it was made, how to load it

The statistics are a safetensors file by content, but not by name: engines take every *.safetensors of a directory for
weights. Mixtures made before that was so have it under the old name, which is still read.

Shapes: L layers, E experts, D model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from octad.checkpoint.hub_card import front_matter
from octad.checkpoint.provenance import PROVENANCE, Provenance
from octad.combine.fit import Calibration
from octad.combine.statistics import Statistics, pack, unpack
from octad.errors import CheckpointError
from octad.text.windows import Window

STATISTICS, CARD = "router_statistics.octad", "README.md"
OLD_STATISTICS = "router_statistics.safetensors"


def save_statistics(path: Path, calibrations: Sequence[Calibration], statistics: Statistics | None) -> None:
    """Write the statistics' file."""
    tensors: dict[str, torch.Tensor] = {}
    for e, calibration in enumerate(calibrations):
        kinds = {"tokens": calibration.windows, "negative": calibration.negative}
        if calibration.longer:
            kinds["longer"] = calibration.longer
        for kind, windows in kinds.items():
            flat = [i for w in windows for i in w.ids]
            tensors[f"{kind}.{e}"] = torch.tensor(flat, dtype=torch.int32)
            tensors[f"{kind}.{e}.lengths"] = torch.tensor([len(w.ids) for w in windows], dtype=torch.int32)
        if calibration.longer:  # whole documents of it are held out
            documents = [w.document for w in calibration.longer]
            tensors[f"longer.{e}.documents"] = torch.tensor(documents, dtype=torch.int32)
    if statistics is not None:
        tensors["means"] = statistics.means.contiguous()
        tensors["grams"] = pack(statistics.grams)
    save_file(tensors, path, {"format": "pt"})


def load_statistics(directory: Path, experts: int) -> tuple[list[Calibration], Statistics | None]:
    """Calibrations and statistics of a mixture. Raises CheckpointError where they are missing or do not fit."""
    path = directory / STATISTICS
    if not path.exists() and (old := directory / OLD_STATISTICS).exists():
        path = old
    try:
        tensors = load_file(path)
        calibrations = [
            Calibration(
                _windows(tensors, f"tokens.{e}"),
                _windows(tensors, f"negative.{e}"),
                _windows(tensors, f"longer.{e}") if f"longer.{e}" in tensors else [],
            )
            for e in range(experts)
        ]
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error}); combine again") from None
    if "means" not in tensors:
        return calibrations, None
    means = tensors["means"]
    if means.shape[1] != experts:
        raise CheckpointError(
            f"{path}: is of {means.shape[1]} experts, the checkpoint has {experts}; combine again"
        )
    return calibrations, Statistics(unpack(tensors["grams"], means.shape[2]), means)


def _windows(tensors: Mapping[str, torch.Tensor], key: str) -> list[Window]:
    pieces = torch.split(tensors[key], tensors[f"{key}.lengths"].tolist())
    documents = tensors.get(f"{key}.documents", torch.arange(len(pieces))).tolist()
    return [Window(tuple(piece.tolist()), 0, d) for piece, d in zip(pieces, documents, strict=True)]


def model_card(provenance: Provenance, config: Mapping[str, Any], parameters: int, active: int) -> str:
    """README.md of the checkpoint, with the front matter that model hubs read."""
    experts = [
        " | ".join(
            ("", str(e), x["name"], x["model"], x["kind"], _exactness(x["exact"]), f"{x['tokens']:,}", "")
        )
        for e, x in enumerate(provenance.experts)
    ]
    held = [(x["name"], x.get("held", {}).get("sentence", "")) for x in provenance.experts if not x["exact"]]
    lost = "".join(f"\n- {name}: {sentence}" for name, sentence in held if sentence)
    edits = (
        f"\nChanged since it was first combined: {', '.join(provenance.edits)}.\n" if provenance.edits else ""
    )
    router, shared = (provenance.method(section) for section in ("router", "shared"))
    head = front_matter(
        ["moe", "octad", "merge"],
        base=provenance.base.get("hub", ""),
        relation="merge",
        license=provenance.base.get("license", ""),
        datasets=[file for expert in provenance.recipe.get("experts", []) for file in expert.get("data", [])],
    )
    return f"""{head}# A mixture of {len(provenance.experts)} experts

Made with octad out of {len(provenance.experts)} models of one base
(`{provenance.recipe["base"]}`): {parameters:,} parameters, of which {active:,} work on a token
(top-{config["num_experts_per_tok"]}). Architecture: {config["architectures"][0]}; it loads with
`transformers.AutoModelForCausalLM.from_pretrained` and needs no custom code. The licences of the base and of the
members apply.

| expert | name | model | kind | held exactly | calibration tokens |
|---|---|---|---|---|---|
{chr(10).join(experts)}
{lost}
{edits}
Attention, norms and embeddings: `{shared}`. Routers: `{router}`. The whole recipe and a SHA-256 digest of every input
file are in `{PROVENANCE}`; `{STATISTICS}` lets `octad expert add | replace | remove` change one expert exactly.
"""


def _exactness(exact: bool | None) -> str:
    return {True: "yes", False: "in part", None: "not measured"}[exact]
