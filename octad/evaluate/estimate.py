"""How long judging will take, roughly, before it begins.

judging_seconds(source.config, tokens=4096 * 8)
"""

from __future__ import annotations

from octad.dist import compute_dtype, product_rate
from octad.model import cost
from octad.model.config import ModelConfig, dense_config

USUAL = 0.4  # of the rate of large matrix products, what reading reaches


def judging_seconds(config: ModelConfig, tokens: int, *, other_k: bool = True) -> float:
    """For a model beside everything it is made of, where nothing of it is known yet: each expert alone, and the mixture
    with one, two, its own number and all of them, which is about as much as each of them once more; without `other_k`
    with its own number alone, the experts' mean beside it."""
    own = cost.flops_per_token(config)
    if config.is_moe:
        alone = cost.flops_per_token(dense_config(config))
        own = config.num_experts * (alone + own) if other_k else (config.num_experts + 1) * alone + 2 * own
    return tokens * own / (USUAL * product_rate(compute_dtype(), seconds=0.1))
