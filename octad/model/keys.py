"""The values of a config.json, each checked for its kind and size before it is used. Imports no torch.

    keys = Keys(raw, FAMILIES["mixtral"].defaults)
    keys.whole("hidden_size"), keys.number("rms_norm_eps"), keys.flag("tie_word_embeddings")

A file may be damaged or hostile: what is no number, not finite, or more than any model has, is refused by name with
ConfigError, before anything is sized by it. A key that is absent or null counts as the family's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from octad.errors import ConfigError

# several times what the largest known models have; more means a damaged file
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 23,
    "moe_intermediate_size": 1 << 23,
    "shared_expert_intermediate_size": 1 << 23,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "num_experts": 1 << 16,
    "num_local_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
}
MOST_EXPERTS_IN_ALL = 1 << 18  # over all layers: each has a name of its own in the lists that loading makes
LARGEST_WHOLE = 1 << 48
LARGEST_NUMBER = 1e30


class Keys:
    """One config.json, and what it means where it is silent."""

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.raw, self.defaults = raw, defaults

    def get(self, key: str) -> Any:
        """The value; an absent key and null are the default, or None."""
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def nullable(self, key: str) -> Any:
        """The value where null means "none" and only an absent key is the default."""
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number from `least` on. Raises ConfigError."""
        return whole(key, self.get(key), least)

    def number(self, key: str) -> float:
        """A finite number above 0. Raises ConfigError."""
        return number(key, self.get(key))

    def flag(self, key: str) -> bool:
        """True or false; false where neither file nor family says anything. Raises ConfigError."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise _wrong(key, "true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        """A string. Raises ConfigError."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _wrong(key, "a string", value)
        return value

    def items(self, key: str, kind: type) -> tuple[Any, ...]:
        """A list of values of one kind, empty where absent. Raises ConfigError."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or any(type(v) is not kind for v in value):
            what = "whole numbers" if kind is int else "strings"
            raise _wrong(key, f"a list of {what}", value)
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where there is none. Raises ConfigError."""
        value = self.raw.get(key)
        listed = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        return tuple(whole(key, v, least=-1) for v in listed)  # some files say -1 for none


def whole(key: str, value: Any, least: int = 1) -> int:
    """`value`, found under `key`, if it is a whole number from `least` to what models have. Raises ConfigError."""
    if type(value) is not int or value < least:
        kind = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
        raise _wrong(key, kind, value)
    if value > LARGEST.get(key, LARGEST_WHOLE):
        raise ConfigError(
            f"config.json: {key} is {_shown(value)}, more than any model has; the file is damaged"
        )
    return value


def number(key: str, value: Any) -> float:
    """`value`, found under `key`, if it is a finite number above 0. Raises ConfigError."""
    if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER or not math.isfinite(value):
        raise _wrong(key, "a finite number above 0", value)
    return float(value)


def _wrong(key: str, wanted: str, value: Any) -> ConfigError:
    return ConfigError(f"config.json: {key} must be {wanted}, found {_shown(value)}")


def _shown(value: Any) -> str:
    """The value, shortened; a number too long to print by its size."""
    if type(value) is int and abs(value) >= 10**30:
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
