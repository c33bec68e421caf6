"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

Two kinds: `gpt2` (byte-level BPE; its pre-tokenizer is named by `tokenizer.ggml.pre`) and `llama`
(SentencePiece BPE: scores, byte fallback, a space put before the text). The patterns are those of the hub's
tokenizer.json of each family; a name that is not in the table is refused, because a wrong split would
silently change every count and loss. Reference for ids: llama.cpp's src/llama-vocab.cpp, against which the
tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octad.checkpoint.gguf.header import GGUFHeader
from octad.errors import CheckpointError
from octad.text import tokenizer as text
from octad.text.tokenizer_file import check_pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type; 5 is unused, 6 a byte
NO_TOKEN = 2**32 - 1  # how some files say that there is none
# A turn's end in files of before `eot_token_id` existed.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def gguf_tokenizer(path: str | Path | GGUFHeader) -> text.Tokenizer:
    """The tokenizer of a GGUF file (a path, or a header already read). Raises CheckpointError."""
    header = path if isinstance(path, GGUFHeader) else GGUFHeader.read(Path(path))
    vocabulary = GGUFVocabulary.of(header)
    return text.Tokenizer(
        build_tokenizer(vocabulary), token_config(vocabulary), vocabulary.end_ids(), label=str(header.path)
    )


@dataclass(frozen=True)
class _Scheme:
    """How a byte-level BPE family cuts text before merging."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _regex(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Cut at each match of each pattern in turn, then map bytes to characters."""

    def build() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*splits, _byte_level(use_regex=False)])

    return build


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


_GPT2_SCHEME = _Scheme(lambda: _byte_level(use_regex=True))
_LLAMA3_SCHEME = _Scheme(_regex(_LLAMA3), ignore_merges=True, add_bos=True)
SCHEMES: Mapping[str, _Scheme] = {
    "smollm": _Scheme(_digits),
    "starcoder": _Scheme(_digits),
    "gpt-2": _GPT2_SCHEME,
    "olmo": _Scheme(lambda: _byte_level(use_regex=True), nfc=True),
    "qwen2": _Scheme(_regex(_QWEN2), nfc=True),
    "deepseek-r1-qwen": _Scheme(_regex(_QWEN2), nfc=True),
    "llama-bpe": _LLAMA3_SCHEME,
    "llama3": _LLAMA3_SCHEME,
    "llama-v3": _LLAMA3_SCHEME,
    "smaug-bpe": _Scheme(_regex(_LLAMA3)),
    "tekken": _Scheme(_regex(_TEKKEN), ignore_merges=True, add_bos=True),
    # No model's own: what llama.cpp falls back to where a file does not name its pre-tokenizer.
    "default": _Scheme(_regex(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclass(frozen=True)
class GGUFVocabulary:
    """The tokenizer entries of a GGUF header, checked."""

    path: Path
    values: Mapping[str, Any]
    tokens: Sequence[str]
    types: Sequence[int]

    @classmethod
    def of(cls, header: GGUFHeader) -> GGUFVocabulary:
        """CheckpointError where the vocabulary is missing or its parts differ in length."""
        prefix = "tokenizer."
        values = {k.removeprefix(prefix): v for k, v in header.metadata.items() if k.startswith(prefix)}
        tokens = values.get("ggml.tokens")
        if not tokens or not isinstance(tokens, list):
            raise CheckpointError(f"{header.path}: holds no tokenizer (tokenizer.ggml.tokens is missing)")
        types = values.get("ggml.token_type") or [NORMAL] * len(tokens)
        vocabulary = cls(header.path, values, tokens, types)
        if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
            raise CheckpointError(
                f"{header.path}: damaged vocabulary: token types are missing or a token occurs twice"
            )
        return vocabulary

    def token_id(self, name: str) -> int | None:
        """The id of a named token (`eos`, `eot`, ...), or None."""
        token = self.values.get(f"ggml.{name}_token_id")
        return token if isinstance(token, int) and 0 <= token < len(self.tokens) else None

    def ids(self) -> dict[str, int]:
        """Token text -> id."""
        return {token: i for i, token in enumerate(self.tokens)}

    def added(self) -> list[AddedToken]:
        """Tokens that are matched as whole strings before anything else; control tokens are special."""
        return [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]

    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a turn or a text: eos, eot, eom as the file has them, and a turn's end known by its text."""
        named = [self.values.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        ids = self.ids()
        ends = [ids[text] for text in TURN_ENDS if text in ids and self.types[ids[text]] == CONTROL]
        return tuple(dict.fromkeys(i for i in [*named, *ends] if type(i) is int and 0 <= i < NO_TOKEN))


def build_tokenizer(vocabulary: GGUFVocabulary) -> Tokenizer:
    """The `tokenizers` object of the same ids. Raises CheckpointError for a kind that is not in the tables."""
    kind = vocabulary.values.get("ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        supported = ", ".join(builders)
        raise CheckpointError(
            f"{vocabulary.path}: tokenizer {kind!r} is not supported (supported: {supported})"
        )
    tokenizer, add_bos = builders[kind](vocabulary)
    check_pieces(tokenizer, str(vocabulary.path))
    tokenizer.add_tokens([token for token in vocabulary.added() if not token.special])
    tokenizer.add_special_tokens([token for token in vocabulary.added() if token.special])
    _set_template(tokenizer, vocabulary, add_bos)
    return tokenizer


def token_config(vocabulary: GGUFVocabulary) -> dict[str, Any]:
    """tokenizer_config.json: the named tokens' texts, the chat template, the class that loads tokenizer.json
    as it is.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, gguf_name in NAMED_TOKENS.items():
        if (token := vocabulary.token_id(gguf_name)) is not None:
            config[f"{name}_token"] = vocabulary.tokens[token]
    if template := vocabulary.values.get("chat_template"):
        config["chat_template"] = template
    return config


def _byte_level_bpe(vocabulary: GGUFVocabulary) -> tuple[Tokenizer, bool]:
    name = vocabulary.values.get("ggml.pre", "default")
    scheme = SCHEMES.get(name)
    if scheme is None:
        known = ", ".join(SCHEMES)
        raise CheckpointError(
            f"{vocabulary.path}: pre-tokenizer {name!r} is not supported (supported: {known})"
        )
    ids, merges = vocabulary.ids(), [_pair(merge) for merge in vocabulary.values.get("ggml.merges", ())]
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(
                f"{vocabulary.path}: damaged vocabulary: no tokens for the merge {left!r} {right!r}"
            )
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=scheme.ignore_merges))
    if scheme.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = scheme.split()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, scheme.add_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _sentencepiece_bpe(vocabulary: GGUFVocabulary) -> tuple[Tokenizer, bool]:
    scores = vocabulary.values.get("ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.path}: tokenizer.ggml.scores should hold one score per token")
    unknown = next(
        (t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == UNKNOWN), None
    )
    model = models.BPE(
        vocab=vocabulary.ids(),
        merges=merges_of(vocabulary, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(vocabulary.values.get("ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def merges_of(vocabulary: GGUFVocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: SentencePiece's greedy merging as a list of
    merges.
    """
    ids = {
        t: i
        for i, (t, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind == NORMAL
    }
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[i], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _set_template(tokenizer: Tokenizer, vocabulary: GGUFVocabulary, add_bos: bool) -> None:
    """What `encode(add_special_tokens=True)` puts around a text: bos before it, eos after it, as the metadata
    say.
    """
    wanted = {
        "bos": vocabulary.values.get("ggml.add_bos_token", add_bos),
        "eos": vocabulary.values.get("ggml.add_eos_token", False),
    }
    ids = {name: vocabulary.token_id(name) for name, on in wanted.items() if on}
    for name, i in ids.items():
        said = vocabulary.values.get(f"ggml.{name}_token_id", NO_TOKEN)
        if i is None and said not in (-1, NO_TOKEN):
            raise CheckpointError(
                f"{vocabulary.path}: damaged vocabulary: its token {name} is {said}, of {len(vocabulary.tokens)} tokens"
            )
    special = {vocabulary.tokens[i]: i for i in ids.values() if i is not None}
    if not special:
        return
    around = {name: [vocabulary.tokens[i]] for name, i in ids.items() if i is not None}
    first, last = around.get("bos", []), around.get("eos", [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B:1", *last],
        special_tokens=list(special.items()),
    )
