"""How vLLM's own code reads a quantization_config, as JSON: run with the Python of its own environment.

VLLM_PYTHON vllm_schemes.py < '{"config": {...}, "layers": {"model.layers.0.mlp.gate": "Linear"}, "moe": [576, 1536]}'
> '{"layers": {"model...": [bits, group] or null}, "marlin": {"128": true, ...}, "moe": true}'
"""

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def read(config: dict[str, Any], layers: dict[str, str], moe: list[int]) -> dict[str, Any]:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.layers.quantization.utils import marlin_utils

    ours = CompressedTensorsConfig.from_config(config)
    ours.packed_modules_mapping = FUSED
    ours._add_fused_moe_to_target_scheme_map()
    schemes: dict[str, list[int] | None] = {}
    for name, kind in layers.items():
        found = ours.get_scheme_dict(type(kind, (), {})(), name)
        schemes[name] = [found["weights"].num_bits, found["weights"].group_size] if found else None
        assert found is None or found["format"] == "pack-quantized"
    groups = {group for scheme in schemes.values() if scheme for group in scheme[1:]}
    sizes = SimpleNamespace(hidden_dim=moe[0], intermediate_size_per_partition_unpadded=moe[1])
    expert = next(group for name, (_, group) in ((n, s) for n, s in schemes.items() if s) if "mlp" in name)
    return {
        "layers": schemes,
        "marlin": {str(group): group in marlin_utils.MARLIN_SUPPORTED_GROUP_SIZES for group in groups},
        "moe": marlin_utils.check_moe_marlin_supports_config(sizes, expert),
    }


if __name__ == "__main__":
    asked, stdout = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)
    os.write(stdout, json.dumps(read(asked["config"], asked["layers"], asked["moe"])).encode())
    os._exit(0)
