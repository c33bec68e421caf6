"""A tokenizer as GGUF's metadata, proved on the way: what is written is read again and has to give the same ids.

    values = vocabulary_values(tokenizer, size=49152)      # {"ggml.model": "gpt2", "ggml.pre": "smollm", ...}
    add_vocabulary(writer, values)

GGUF names the way in which text is cut before merging (`ggml.pre`) instead of describing it. The name is found by trying
those that octad reads: the first with which a page of awkward text, in many scripts, comes out in the tokenizer's own
ids. A tokenizer that none of them reproduces is refused: a wrong cut would silently change every count and loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octad.checkpoint.gguf.vocabulary import (
    CONTROL,
    NORMAL,
    SCHEMES,
    UNKNOWN,
    USER_DEFINED,
    GGUFVocabulary,
    build_tokenizer,
)
from octad.errors import CheckpointError
from octad.text.tokenizer import Tokenizer
from octad.text.tokenizer_file import check_rows

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer as Core

UNUSED, BYTE = 5, 6
ENDS = ("eos", "eot", "eom")
PROBES = (
    "Hello, world! It's 3.14159 o'clock; they'LL've said \"I'd\" 1,234,567 times.",
    "  leading, trailing   and\t\ttabs \n\n\nnew\r\nlines \u00a0nbsp\u3000wide ",
    "def f(x: int) -> str:\n    return f'{x!r:>8}' + \"\\n\"  # a comment\n\n\tif (a&&b||!c) { i++; }",
    "Ä, ö, ü, ß; déjà vu, façade, œuvre; ¿Qué? ¡Señor! Ω≈ç√∫˜µ≤≥÷ ﬁ ﬀ Å\u030a e\u0301",
    "Привет, мир! Съешь ещё 100 этих мягких булок.  Ελληνικά. עִבְרִית. العربية ١٢٣ हिन्दी १२३ ไทย",
    "你好，世界！12345 日本語のテキスト、カタカナ。 한국어 텍스트 2024년 1월",
    "😀😃🏳️‍🌈👩‍👩‍👧‍👦 🇩🇪 \U0001f9d1\U0001f3fd ½ ⅔ ² ³ ①②③ Ⅳ 1st 2nd 99%",
    "https://example.org/a_b-c?x=1&y=2#z <b>bold</b> &amp; [link](url) **md** `code` ~~~ ### $x^2_{i+1}$",
    "aaaaaaaaaaaaaaaaaaaa AAAA aAaA CamelCase snake_case SCREAMING_CASE kebab-case x86_64 v1.2.3-rc4",
    "\u0000\u0001\u200b\u200d\ufeff\u2028 ''' \"\"\" ... ---- ==== //// \\\\\\\\ ((([[[{{{ }}}]]]) 's 't 'RE 'Ve",
    "1 12 123 1234 12345 123456 1234567 12345678 0x1F 1e-10 1_000_000 007 ٣٤٥",
    " a  b   c    d     e      f\n g\n  h\n   i\n    j",
)


def vocabulary_values(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The metadata, without the prefix "tokenizer.", of a vocabulary filled up to `size` ids. Raises CheckpointError for
    a tokenizer that GGUF, as octad and llama.cpp read it, does not give back."""
    core: dict[str, Any] = json.loads(tokenizer.core.to_str())
    model = core["model"]
    if model.get("type") != "BPE":
        raise _refusal(tokenizer, f"its model is {model.get('type')}, GGUF holds BPE")
    values = _tokens(tokenizer, size, bytes_fall_back=bool(model.get("byte_fallback")))
    values |= _named(tokenizer)
    if model.get("byte_fallback"):
        return _proved(tokenizer, [values | _sentencepiece(core, values["ggml.tokens"])])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return _proved(
        tokenizer,
        (values | {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": merges} for pre in SCHEMES),
    )


def _tokens(tokenizer: Tokenizer, size: int, *, bytes_fall_back: bool) -> dict[str, Any]:
    """Texts and kinds of all ids; those without a token get a name of their own."""
    texts = tokenizer.texts
    check_rows(tokenizer, size, added=True)
    added = tokenizer.core.get_added_tokens_decoder()
    unknown = tokenizer.config.get("unk_token")

    def kind(i: int) -> int:
        if i not in texts:
            return UNUSED
        if bytes_fall_back and texts[i] == unknown:
            return UNKNOWN
        if i in added:
            return CONTROL if added[i].special else USER_DEFINED
        return BYTE if bytes_fall_back and len(texts[i]) == 6 and texts[i].startswith("<0x") else NORMAL

    return {
        "ggml.tokens": [texts.get(i, f"[PAD{i}]") for i in range(size)],
        "ggml.token_type": [kind(i) for i in range(size)],
    }


def _named(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids by their roles, what is put around a text, and the chat template."""
    found: dict[str, Any] = {}
    ends = [i for i in dict.fromkeys((tokenizer.eos_id, *tokenizer.eos_ids)) if i is not None]
    for name, i in zip(ENDS, ends, strict=False):
        found[f"ggml.{name}_token_id"] = i
    for name, named in (("bos", tokenizer.bos_id), ("padding", tokenizer.pad_id)):
        if named is not None:
            found[f"ggml.{name}_token_id"] = named
    unknown = tokenizer.config.get("unk_token")
    if isinstance(unknown, str) and (known := tokenizer.core.token_to_id(unknown)) is not None:
        found["ggml.unknown_token_id"] = known
    ids = tokenizer.encode("a", add_special_tokens=True)
    found["ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_id
    found["ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_id
    if tokenizer.chat_template:
        found["chat_template"] = tokenizer.chat_template
    return found


def _sentencepiece(core: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """SentencePiece's scores from the order of merges: the earlier a token is made, the higher its score."""
    order: dict[str, int] = {}
    for rank, pair in enumerate(core["model"]["merges"]):
        left, right = pair if not isinstance(pair, str) else pair.split(" ", 1)
        order.setdefault(left + right, rank)
    last = len(order)
    scores = [-float(order.get(token, last)) for token in tokens]
    prefix = '"Prepend"' in json.dumps(core.get("normalizer")) or '"first"' in json.dumps(
        core.get("pre_tokenizer")
    )
    return {"ggml.model": "llama", "ggml.scores": scores, "ggml.add_space_prefix": prefix}


def _proved(tokenizer: Tokenizer, candidates: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The first candidate that reads like the tokenizer. Raises CheckpointError where none does."""
    wanted = [tokenizer.core.encode(text, add_special_tokens=True).ids for text in PROBES]
    for values in candidates:
        vocabulary = GGUFVocabulary(
            Path(tokenizer.label), values, values["ggml.tokens"], values["ggml.token_type"]
        )
        try:
            read = build_tokenizer(vocabulary)
        except CheckpointError:
            continue
        if [read.encode(text, add_special_tokens=True).ids for text in PROBES] == wanted:
            _check_neighbours(tokenizer, read)
            return values
    raise _refusal(tokenizer, "no way of cutting text that GGUF names gives its ids")


def _check_neighbours(tokenizer: Tokenizer, read: Core) -> None:
    """Raises CheckpointError where an added token minds what stands beside it (takes blanks along, or whole words alone):
    GGUF cannot tell, and whoever reads it finds such tokens anywhere."""
    added = tokenizer.core.get_added_tokens_decoder().values()
    for token in (t.content for t in added if t.lstrip or t.rstrip or t.single_word):
        for text in (f"a{token}b", f"a {token} b"):
            if read.encode(text).ids != tokenizer.core.encode(text).ids:
                raise _refusal(
                    tokenizer,
                    f"{token!r} minds its neighbours (lstrip, rstrip or single_word), GGUF does not",
                )


def _refusal(tokenizer: Tokenizer, why: str) -> CheckpointError:
    return CheckpointError(f"{tokenizer.label}: this tokenizer cannot be written as GGUF: {why}")


def add_vocabulary(writer: GGUFWriter, values: Mapping[str, Any]) -> None:
    """Put the values into a file."""
    for key, value in values.items():
        name = f"tokenizer.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
