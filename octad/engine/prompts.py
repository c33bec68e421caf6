"""Prompts as the engine takes them: token ids, in whatever holds whole numbers.

    token_ids([1, 2, 3]); token_ids(torch.tensor([1, 2, 3])); token_ids(numpy_array)
    check_request(ids, params, tokenizer, config, context=4096)

Lists, tuples and one-dimensional arrays of integers are one thing; text, floats and None are mistakes that would
otherwise show up deep inside the model. Imports neither torch nor numpy.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octad.errors import RequestError

if TYPE_CHECKING:
    from octad.engine.params import SamplingParams
    from octad.model.config import ModelConfig
    from octad.text.tokenizer import Tokenizer


def token_ids(prompt: Any) -> list[int]:
    """The ids as a list. Raises RequestError for anything but a row of whole numbers."""
    if hasattr(prompt, "tolist"):  # torch, numpy
        prompt = prompt.tolist()
    if not isinstance(prompt, (list, tuple, range)):
        kind = "a list of ids" if isinstance(prompt, int) else type(prompt).__name__
        raise RequestError(f"prompts: found {kind}; give a list of prompts, [[1, 2, 3]] for one of ids")
    if all(type(token) is int for token in prompt):
        return list(prompt)
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise RequestError(
                f"prompts: found {str(token)[:50]!r} among the ids; token ids are whole numbers"
            )
    return [int(token) for token in prompt]


def end_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, else the config's, that the model has rows for."""
    ends = tokenizer.eos_ids or config.eos_token_ids
    return tuple(i for i in ends if 0 <= i < config.vocab_size)


def check_request(
    prompt: Sequence[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    config: ModelConfig,
    context: int,
    why_so_short: str = "",
) -> None:
    """Raises RequestError for a prompt that a model of this config cannot answer within `context` tokens, answer and all,
    and for params that ask for ids or experts which it does not have."""
    vocabulary, experts = config.vocab_size, config.num_experts
    if not prompt:
        raise RequestError("the prompt is empty; give some text")
    if len(prompt) >= context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the context {context} with the answer{why_so_short}; shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise RequestError(_outside(prompt, vocabulary, tokenizer))
    params.check_vocabulary(vocabulary)
    if params.only_experts and not experts:
        raise RequestError("only_experts: this model is dense, it has no experts; leave it out")
    if params.only_experts and params.only_experts[-1] >= experts:
        raise RequestError(
            f"only_experts: found {params.only_experts[-1]}, allowed: numbers from 0 to {experts - 1}"
        )


def _outside(prompt: Sequence[int], vocabulary: int, tokenizer: Tokenizer) -> str:
    """Whose fault it is that a prompt holds ids for which the model has no row: the tokenizer's, or the caller's."""
    token = next(i for i in prompt if not 0 <= i < vocabulary)
    if (text := tokenizer.texts.get(token)) is None:
        return f"the prompt holds ids outside 0..{vocabulary - 1}; encode it with this model's tokenizer"
    return (
        f"{tokenizer.label}: its tokenizer reads {text!r} as id {token}, for which the model has no row"
        f" (it has {vocabulary}); the tokenizer is another model's, or was added to without resizing the embeddings"
    )
