"""Routing on the wire: vLLM's `routed_experts`, base64 of a .npy file [tokens - 1 - start, layers, top_k].

    routes_of(output, index)            # one answer's, with its prompt's from routed_experts_prompt_start on
    weights_of(output, index)           # octad's own `routed_weights`: the share of the weight that each of them had

A row belongs to a position that was read; the last token was never read, so there is one row less than tokens. The
smallest of uint8, uint16 and int32 that holds the numbers; layers without a router hold -1, and then it is int32.
"""

from __future__ import annotations

import base64
import io

import numpy as np

from octad.engine.outputs import RequestOutput


def routes_of(output: RequestOutput, index: int) -> str | None:
    """None for a model without routers."""
    answer = output.outputs[index]
    if answer.routed_experts is None or output.prompt_routed_experts is None:
        return None
    return encoded_ids(
        np.concatenate([output.prompt_routed_experts.numpy(), answer.routed_experts.numpy()[1:]])
    )


def weights_of(output: RequestOutput, index: int) -> str | None:
    """The weights that belong to routes_of, float32; 0 in layers without a router. None for a model without routers."""
    answer = output.outputs[index]
    if answer.routed_weights is None or output.prompt_routed_weights is None:
        return None
    rows = np.concatenate([output.prompt_routed_weights.numpy(), answer.routed_weights.numpy()[1:]])
    return _file(rows.astype(np.float32))


def encoded_ids(rows: np.ndarray) -> str:
    """Experts' numbers as the wire has them."""
    least, most = (int(rows.min()), int(rows.max())) if rows.size else (0, 0)
    kind = np.int32 if least < 0 or most > 65535 else np.uint8 if most < 256 else np.uint16
    return _file(rows.astype(kind))


def _file(values: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()
