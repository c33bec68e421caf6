"""Who spoke, from what other engines tell of their routing.

    routes = routes_in(answer, choice)                # ids [rows, layers, top_k], or None
    entries = speakers(routes, tokens, text, names)   # [{"token", "expert", "weight"}], the texts joined are `text`

vLLM (`--enable-return-routed-experts`): `choices[i].routed_experts`, base64 of a .npy [tokens - 1 - start, layers,
top_k], whole answers only. SGLang (`return_routed_experts`): `sglext.routed_experts` of the response, or of a stream's
last chunk but one; base64 of bare int32 without a shape, the first choice's alone. In both a row belongs to a position
that was read, so the rows that led to an answer's T tokens are the last T. Neither sends weights: a speaker is who has
most of the places (layers times top_k), its weight its share of them; of two with as many, who came first more often.

Shapes: T tokens of the answer, L layers, K experts a token, E experts.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY"
MOST_BYTES = 1 << 30


def routes_in(answer: Mapping[str, Any], choice: Mapping[str, Any] | None, shape: tuple[int, int]) -> Any:
    """Ids [rows, L, K] as an integer array; None where nothing is told, or nothing that can be read. `shape`: layers and
    top_k, for SGLang, which sends none; of (0, 0) all places of a row are taken for one layer."""
    told = (choice or {}).get("routed_experts")
    for place in (choice or {}, answer):
        for name in ("sglext", "sgl_ext"):
            if told is None and isinstance(place.get(name), Mapping):
                told = place[name].get("routed_experts")
    if not isinstance(told, str) or len(told) > MOST_BYTES:
        return None
    return _decoded(told, answer, shape)


def _decoded(told: str, answer: Mapping[str, Any], shape: tuple[int, int]) -> Any:
    try:
        data = base64.b64decode(told, validate=True)
        if data.startswith(MAGIC):
            found = np.load(io.BytesIO(data), allow_pickle=False)
            return found if found.ndim == 3 and found.dtype.kind in "iu" else None
        flat = np.frombuffer(data, "<i4")
    except (binascii.Error, ValueError, EOFError, OSError):
        return None
    layers, top_k = shape
    if layers and top_k and len(flat) % (layers * top_k) == 0:
        return flat.reshape(-1, layers, top_k)
    rows = _rows(answer)
    return flat.reshape(rows, 1, -1) if rows > 0 and len(flat) % rows == 0 else None


def _rows(answer: Mapping[str, Any]) -> int:
    """How many positions of one answer were read, as its usage says."""
    usage = answer.get("usage")
    if not isinstance(usage, Mapping):
        return 0
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return sum(c for c in counts if isinstance(c, int)) - 1


def speakers(
    routes: Any, tokens: Sequence[str], text: str, names: Sequence[str], skipped: str = ""
) -> list[dict[str, Any]]:
    """An entry for each of the answer's tokens that there are rows for. `skipped`: text that the model said before
    `text` and that is told elsewhere (its reasoning)."""
    ids = np.asarray(routes)[-len(tokens) :] if tokens else np.zeros((0, 1, 1), int)
    texts = aligned(tokens, skipped + text)
    gone, found = len(skipped), []
    missing = len(tokens) - len(ids)
    for place, piece in enumerate(texts):
        cut = min(gone, len(piece))
        gone -= cut
        who, share = _most(ids[place - missing]) if place >= missing else (-1, 0.0)
        name = names[who] if 0 <= who < len(names) else f"expert {who}" if who >= 0 else None
        found.append({"token": piece[cut:], "expert": name, "weight": round(share, 4)})
    return found


def _most(ids_LK: Any) -> tuple[int, float]:
    """The expert with the most places, and its share of them; -1 where no layer has a router."""
    valid = ids_LK[ids_LK >= 0]
    if not valid.size:
        return -1, 0.0
    counts = np.bincount(valid.astype(np.int64))
    first = ids_LK[:, 0]
    firsts = np.bincount(first[first >= 0].astype(np.int64), minlength=len(counts))
    who = int(np.lexsort((firsts, counts))[-1])
    return who, float(counts[who] / valid.size)


def aligned(tokens: Sequence[str], text: str) -> list[str]:
    """`text` cut into a piece for each token. A token whose own text is not to be found (a control token, a part of a
    character) gets what lies before the next one that is."""
    pieces, at = [""] * len(tokens), 0
    for place, token in enumerate(tokens):
        start = text.find(token, at, at + len(token) + 8) if token else -1
        if start < 0:
            continue
        pieces[max(place - 1, 0)] += text[at:start]
        pieces[place] += token
        at = start + len(token)
    if pieces:
        pieces[-1] += text[at:]
    return pieces
