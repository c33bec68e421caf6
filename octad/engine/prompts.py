"""Prompts as the engine takes them: token ids, in whatever holds whole numbers.

    token_ids([1, 2, 3]); token_ids(torch.tensor([1, 2, 3])); token_ids(numpy_array)

Lists, tuples and one-dimensional arrays of integers are one thing; text, floats and None are mistakes that would
otherwise show up deep inside the model. Imports neither torch nor numpy.
"""

from __future__ import annotations

import numbers
from typing import Any

from octad.errors import RequestError


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
