"""vLLM loads what octad writes and exports, and says what octad says: the same tokens, the same log probabilities.

Slow, and only with an environment of vLLM's own (`make test-vllm` makes one; VLLM_PYTHON names another's Python). One
process asks it about all models, since it takes most of its time to start. Sizes are the smallest that the attention of
its CPU build takes (heads of 32).
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from other_engines import CASES, save_case
from tiny_models import Octad

from octad.checkpoint.load import open_source
from octad.checkpoint.quantized import QuantizedSource
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams
from octad.export.hub import Changes, export_hub

PYTHON = Path(os.environ.get("VLLM_PYTHON", Path(__file__).parents[2] / ".venv-vllm/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason=f"{PYTHON}: no vLLM; `make test-vllm` installs it"),
]
HELPERS = Path(__file__).parents[1] / "helpers"
PROMPTS = [[5, 6, 7, 8], [40, 50, 60, 70, 80, 90, 100, 110, 120], [300]]
TOKENS = 16
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
MIXTURES = ("mixtral", "mixtral, one expert a token", "mixture of qwen2", "qwen3_moe")
NAMES = [*(case for case in CASES if case != "llama, wide heads"), *(f"{case}, tied" for case in MIXTURES)]


def sizes(case: str) -> dict[str, Any]:
    family, own = CASES[case]
    found = WIDE | ({"head_dim": 32} if family in ("mistral", "qwen3", "qwen3_moe") else {})
    found |= {"moe_intermediate_size": 128} if "moe_intermediate_size" in own else {}
    return found | ({"num_key_value_heads": 4} if family == "olmoe" else {})


def in_vllm(script: str, asked: dict[str, Any]) -> Any:
    """What a script of tests/helpers says, run by vLLM's Python."""
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")
    }
    command = [str(PYTHON), str(HELPERS / script)]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, env=clean, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All models by name; one is what `octad export --untie` makes of another."""
    root, made = tmp_path_factory.mktemp("vllm"), {}
    for number, name in enumerate(NAMES):
        case, tied = name.removesuffix(", tied"), name.endswith(", tied")
        changes = sizes(case) | ({"tie_word_embeddings": True} if tied else {})
        made[name] = save_case(case, root / str(number), **changes)
    export_hub(open_source(made["mixtral, tied"]), root / "untied", Changes(untie=True))
    return made | {"untied by export": root / "untied"}


@pytest.fixture(scope="module")
def theirs(models: dict[str, Path]) -> dict[str, Any]:
    paths = [str(path) for path in models.values()]
    found = in_vllm("vllm_answers.py", {"models": paths, "prompts": PROMPTS, "tokens": TOKENS})
    return {name: found[str(path)] for name, path in models.items()}


@pytest.mark.parametrize("name", [*NAMES, "untied by export"])
def test_vllm_says_what_octad_says(models: dict[str, Path], theirs: dict[str, Any], name: str) -> None:
    assert not isinstance(theirs[name], str), theirs[name]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    said = LLM(models[name], dtype="float32").generate(PROMPTS, params)
    for ours, other in zip((request.outputs[0] for request in said), theirs[name], strict=True):
        assert other["ids"] == ours.token_ids
        assert ours.logprobs is not None
        found = [row.chosen.logprob for row in ours.logprobs]
        assert other["logprobs"] == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_how_vllm_reads_rounded_weights(octad: Octad, tmp_path: Path, quantize: str) -> None:
    """Its CPU build multiplies no such weights without AMX, so its own code is asked: which bits and groups it sees in
    each layer as it fuses them, and whether Marlin, the kernel of NVIDIA's GPUs, takes them."""
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 128}
    path = save_case("mixture of qwen2", tmp_path / "model", **sizes("mixture of qwen2") | wide)
    out = tmp_path / "out"
    code, _, err = octad("export", path, "--to", "compressed-tensors", "--quantize", quantize, "-o", out)
    assert code == 0, err
    at, config = "model.layers.0", json.loads((out / "config.json").read_text())["quantization_config"]
    layers = {
        f"{at}.self_attn.qkv_proj": "QKVParallelLinear",
        f"{at}.self_attn.o_proj": "RowParallelLinear",
        f"{at}.mlp.experts.0.down_proj": "RoutedExperts",
        f"{at}.mlp.shared_expert.gate_up_proj": "MergedColumnParallelLinear",
        f"{at}.mlp.gate": "ReplicatedLinear",
        f"{at}.mlp.shared_expert_gate": "ReplicatedLinear",
        "lm_head": "ParallelLMHead",
    }
    said = in_vllm("vllm_schemes.py", {"config": config, "layers": layers, "moe": [256, 256]})
    source = QuantizedSource(out)
    own = {
        "qkv_proj": source.scheme(f"{at}.self_attn.q_proj.weight"),
        "o_proj": source.scheme(f"{at}.self_attn.o_proj.weight"),
        "down_proj": source.scheme(f"{at}.mlp.experts.0.down_proj.weight"),
        "gate_up_proj": source.scheme(f"{at}.mlp.shared_expert.up_proj.weight"),
        "lm_head": source.scheme("lm_head.weight"),
    }
    for name, scheme in said["layers"].items():
        wanted = own.get(name.rpartition(".")[2])
        assert scheme == (None if wanted is None else [wanted.bits, wanted.group]), name
    assert said["marlin"]
    assert all(said["marlin"].values())
    assert said["moe"]
