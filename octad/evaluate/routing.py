"""Routing made visible: who takes what, how sure the routers are, and whether the specialist of a domain is chosen.

    routing = collect_routing(model, tokenizer, {"french": windows, ...}, ["general", "french", ...])
    routing["share"]["french"][3]               # of layer 3's choices, each expert's share; None for a dense model

The mixture reads each domain's windows once, without its head, while observers on the routers sum up; what they keep does
not grow with the text. Padding counts nowhere. The answer is plain lists and numbers, ready for JSON:

- `share[domain][layer][expert]` of the choices (each token makes `num_experts_per_tok` of them in each layer);
- `entropy[domain][layer]` of the whole softmax in nats, before top-k: 0 when certain, ln E when undecided;
- `confidence[domain][layer]`: mean weight that the first choice is given;
- `own_first[domain][layer]`: how often the first choice is the domain's own specialist;
- `dead`: experts that a layer never chose; `twins`: experts of nearly the same weights (see twins.py);
- `top_tokens[expert]`: tokens that it speaks more often than its share lets expect; `examples`: text with its speakers.

The speaker of a token is the expert with the most weight, summed over the layers (as in engine/trace.py).

Shapes: B sequences, S positions, N = B S tokens, D model, E experts, A experts a token, L layers with a router.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octad.engine.detokenize import TokenWindow, token_text
from octad.evaluate.twins import find_twins
from octad.model.observe import mixtures, watching
from octad.model.transformer import Transformer
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window, batches

Progress = Callable[[int], None]
TOP_TOKENS = 16  # of each expert
MIN_COUNT = 4  # times that an expert must have spoken a token before it is called typical
EXAMPLE_TOKENS = 160


def collect_routing(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Window]],
    names: Sequence[str],
    *,
    own: Mapping[str, str] | None = None,
    top_tokens: int = TOP_TOKENS,
    min_count: int = MIN_COUNT,
    example_tokens: int = EXAMPLE_TOKENS,
    tokens_per_batch: int = 4096,
    progress: Progress = lambda tokens: None,
) -> dict[str, Any] | None:
    """What the routers do on each domain's windows; None for a model without routers. `names`: of the experts, in
    order; `own`: the specialist of each domain that has one, by default the expert of its name. `progress` gets the
    tokens of each batch that is done. Raises ValueError where the names are too few or many.
    """
    moes = mixtures(model)
    if not moes:
        return None
    if len(names) != model.config.num_experts:
        raise ValueError(f"{len(names)} names for {model.config.num_experts} experts")
    sums = {
        domain: _observe(model, windows, len(names), _own(names, domain, own), tokens_per_batch, progress)
        for domain, windows in texts.items()
    }
    spoken: Counter[tuple[int, int]] = sum((s.spoken for s in sums.values()), Counter())
    measures = {
        "share": {d: s.share() for d, s in sums.items()},
        "entropy": {d: _rounded(s.entropy / s.tokens) for d, s in sums.items()},
        "confidence": {d: _rounded(s.confidence / s.tokens) for d, s in sums.items()},
        "own_first": {d: _rounded(s.own_first / s.tokens) for d, s in sums.items() if s.own is not None},
    }
    first = {domain: windows[0] for domain, windows in texts.items() if windows}
    return {
        "experts": list(names),
        "layers": list(moes),
        **measures,
        "dead": _dead(list(sums.values()), list(moes), names),
        "twins": find_twins([moe.experts for moe in moes.values()], names),
        "top_tokens": typical_tokens(spoken, tokenizer, names, top_tokens, min_count),
        "examples": [_example(model, tokenizer, d, w, example_tokens) for d, w in first.items()],
    }


def _own(names: Sequence[str], domain: str, own: Mapping[str, str] | None) -> int | None:
    """The domain's specialist: the expert that is said to be, or that has its name."""
    name = domain if own is None else own.get(domain)
    return names.index(name) if name in names else None


def _rounded(x: torch.Tensor) -> list[Any]:
    """A tensor as nested lists, to six digits after the point: more would only fill the page."""
    return torch.round(x.double().cpu(), decimals=6).tolist()


# ---- observing ----------------------------------------------------------------------------------------------


class Sums:
    """What one domain's tokens add up to: choices_LE, and sums over tokens of entropy_L, confidence_L, own_first_L;
    spoken[token id, speaker] counts tokens."""

    def __init__(self, layers: int, experts: int, own: int | None) -> None:
        self.own, self.tokens = own, 0
        self.choices = torch.zeros(layers, experts, dtype=torch.long)
        self.entropy, self.confidence, self.own_first = torch.zeros(3, layers, dtype=torch.float64)
        self.spoken: Counter[tuple[int, int]] = Counter()

    def share(self) -> list[list[float]]:
        """[L, E] of the choices; rows sum to 1."""
        shares: list[list[float]] = _rounded(self.choices / self.choices.sum(-1, keepdim=True).clamp(min=1))
        return shares

    def add(self, at: int, p_NE: torch.Tensor, weights_NA: torch.Tensor, experts_NA: torch.Tensor) -> None:
        """One layer's answer for real tokens: the whole softmax, and the choice."""
        self.choices[at] += torch.bincount(experts_NA.flatten().cpu(), minlength=self.choices.shape[1])
        best = weights_NA.argmax(-1, keepdim=True)
        first_N = experts_NA.gather(1, best)[:, 0]
        self.entropy[at] += float(torch.special.entr(p_NE).sum(dtype=torch.float64))
        self.confidence[at] += float(weights_NA.gather(1, best).sum(dtype=torch.float64))
        if self.own is not None:
            self.own_first[at] += int((first_N == self.own).sum())


@torch.inference_mode()
def _observe(
    model: Transformer,
    windows: Sequence[Window],
    num_experts: int,
    own: int | None,
    tokens_per_batch: int,
    progress: Progress,
) -> Sums:
    sums = Sums(len(mixtures(model)), num_experts, own)
    device = model.model.norm.weight.device
    for batch in batches(windows, tokens_per_batch):
        mask_N = batch.mask.flatten()
        with observed(model, mask_N.to(device), sums.add) as said_NE:
            model.model(batch.tokens.to(device))
        pairs = zip(batch.tokens.flatten()[mask_N].tolist(), _loudest(said_NE), strict=True)
        sums.spoken.update(pairs)
        sums.tokens += len(said_NE)
        progress(len(said_NE))
    sums.tokens = max(1, sums.tokens)
    return sums


def _loudest(said_NE: torch.Tensor) -> list[int]:
    return said_NE.argmax(-1).tolist()


@contextmanager
def observed(
    model: Transformer, mask_N: torch.Tensor, add: Callable[..., None] | None = None
) -> Iterator[torch.Tensor]:
    """Inside, `add(layer's place, p_NE, weights_NA, experts_NA)` hears every router about the tokens of the mask. Yields
    said_NE, the weight of each expert in each of these tokens, summed over the layers."""
    said_NE = torch.zeros(int(mask_N.sum()), model.config.num_experts, device=mask_N.device)

    places = {layer: at for at, layer in enumerate(mixtures(model))}

    def hear(layer: int, gate: Any, x_ND: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> None:
        weights_NA, experts_NA = weights[mask_N].float(), experts[mask_N].long()
        said_NE.scatter_add_(1, experts_NA, weights_NA)
        if add is not None:
            p_NE = probabilities(gate, x_ND, mask_N, weights_NA, experts_NA)
            add(places[layer], p_NE, weights_NA, experts_NA)

    with watching(model, hear):
        yield said_NE


def probabilities(
    gate: nn.Module,
    x_ND: torch.Tensor,
    mask_N: torch.Tensor,
    weights_NA: torch.Tensor,
    experts_NA: torch.Tensor,
) -> torch.Tensor:
    """p_NE, a router's whole softmax for the tokens of the mask, in float32; of one without weights (a fixed router), the
    weights that it gives. (Top-k follows the softmax in every family that octad reads.)"""
    weight_ED = getattr(gate, "weight", None)
    if isinstance(weight_ED, torch.Tensor):
        return F.linear(x_ND.reshape(-1, x_ND.shape[-1])[mask_N].float(), weight_ED.float()).softmax(-1)
    width = int(experts_NA.max()) + 1 if experts_NA.numel() else 1
    return torch.zeros(len(weights_NA), width, device=weights_NA.device).scatter_add_(
        1, experts_NA, weights_NA
    )


# ---- what follows from it -----------------------------------------------------------------------------------


def _dead(sums: Sequence[Sums], layers: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
    """Experts that no token of any domain chose."""
    if not sums:
        return []
    choices_LE = torch.stack([s.choices for s in sums]).sum(0)
    return [{"layer": layers[at], "expert": names[e]} for at, e in (choices_LE == 0).nonzero().tolist()]


def typical_tokens(
    spoken: Mapping[tuple[int, int], int],
    tokenizer: Tokenizer,
    names: Sequence[str],
    most: int,
    min_count: int,
) -> dict[str, list[dict[str, Any]]]:
    """By expert, the tokens that it speaks at least `min_count` times and more often than by its share of all tokens.

    lift = P(expert | token) / P(expert). They are ordered by the lift that is left when `min_count` tokens of the
    overall mix are added to each token's count: 5 of 5 says less than 99 of 100. Halves of characters are left out."""
    of_token: Counter[int] = Counter()
    of_expert: Counter[int] = Counter()
    for (token, expert), count in spoken.items():
        of_token[token] += count
        of_expert[expert] += count
    total = of_token.total()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    ranked: dict[int, list[tuple[float, int, int]]] = {}
    for (token, expert), count in spoken.items():
        share = of_expert[expert] / total
        careful = (count + min_count * share) / (of_token[token] + min_count) / share
        if count >= min_count and count / of_token[token] > share:
            ranked.setdefault(expert, []).append((careful, count, token))
    for expert, rows in ranked.items():
        for _, count, token in sorted(rows, reverse=True):
            text = token_text(tokenizer, token)
            if "\ufffd" in text or len(found[names[expert]]) >= most:
                continue
            lift = count / of_token[token] / (of_expert[expert] / total)
            found[names[expert]].append({"text": text, "count": count, "lift": round(lift, 4)})
    return found


@torch.inference_mode()
def _example(
    model: Transformer, tokenizer: Tokenizer, domain: str, window: Window, most: int
) -> dict[str, Any]:
    """The beginning of a window, token by token: its text, its speaker, and the speaker's share of the weight."""
    ids = window.ids[:most]
    device = model.model.norm.weight.device
    with observed(model, torch.ones(len(ids), dtype=torch.bool, device=device)) as said_NE:
        model.model(torch.tensor([ids], device=device))
    share_N = said_NE.amax(-1) / said_NE.sum(-1).clamp(min=1e-9)
    text = TokenWindow(tokenizer, (), skip_special_tokens=False)
    pieces = [text.push(token) for token in ids]
    pieces[-1] += text.finish()
    tokens = [
        {"text": piece, "speaker": speaker, "weight": share}
        for piece, speaker, share in zip(pieces, _loudest(said_NE), _rounded(share_N), strict=True)
    ]
    return {"domain": domain, "tokens": tokens}
