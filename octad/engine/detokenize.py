"""Token ids to text while they are generated: whole characters only, and nothing that a stop string may yet take back.

    detokenizer = Detokenizer(tokenizer, prompt_ids, params)
    for token in answer:                       # without the end token
        print(detokenizer.push(token), end="")
        if detokenizer.stopped is not None:
            break
    print(detokenizer.finish())

Pushed and finished pieces joined are `text`. What shapes it: a token is not a text. One character may be spread over
several tokens, and SentencePiece writes a word's space only where something stands before it. So a short window of
tokens is decoded again as it grows, and what is new at its end is the token's text: the cost of a token does not grow
with the answer. U+FFFD at the end of the window may be the beginning of a character and is held back (byte-fallback
tokens in a row are all U+FFFD until the last of them completes a character).

An answer continues its prompt's text, spacing included; after a control token (a chat template's) it begins a new one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from octad.engine.params import SamplingParams
from octad.text.tokenizer import Tokenizer

UNDECODED = "\ufffd"
HELD = 3  # bytes of an unfinished character at most, and so the U+FFFD that stand for one
CONTEXT = 6  # tokens of the prompt that are decoded in front of the answer, or a few more
WINDOW = 16  # tokens that may wait to become whole characters


class Detokenizer:
    """The text of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.stopped: str | None = None
        self._window = TokenWindow(tokenizer, prompt_ids, params.skip_special_tokens)
        self._stops, self._include_stop = tuple(params.stop), params.include_stop_str_in_output
        self._unchecked = params.min_tokens  # stop strings are looked for after that many tokens
        self._pending = ""  # the beginning of a stop string, perhaps
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """Everything that was handed out."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Text that may be shown now; often "" or more than this token's. "" once stopped."""
        if self.stopped is not None:
            return ""
        fresh = self._window.push(token)
        if self._unchecked > 0:
            self._unchecked -= 1
            return self._show(fresh)
        return self._take(fresh)

    def finish(self) -> str:
        """The answer is over: what was held back. "" after a stop string."""
        if self.stopped is not None:
            return ""
        fresh = self._take(self._window.finish())
        rest, self._pending = self._pending, ""
        return fresh + self._show(rest)

    def _take(self, fresh: str) -> str:
        """Look for stop strings; what cannot belong to one is shown."""
        text = self._pending + fresh
        found = _first_stop(text, self._stops)
        if found is not None:
            start, self.stopped = found
            self._pending = ""
            return self._show(text[: start + len(self.stopped) * self._include_stop])
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - held :]
        return self._show(text[: len(text) - held])

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


class TokenWindow:
    """The last tokens of a text: some whose text is out, for context, and those whose text is not yet whole."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special_tokens
        self._ids = self._context_of(prompt_ids)
        self._context = len(self._ids)  # tokens of the window whose text is out
        self._out = len(self._decode())  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """What this token adds in whole characters."""
        if self._silent(token):
            return ""
        self._ids.append(token)
        full = len(self._ids) - self._context > WINDOW
        text = self._decode()
        held = len(text) - len(text.rstrip(UNDECODED))
        if full:
            held = min(held, HELD)  # the others have had their chance
        whole = len(text) - held
        fresh = text[self._out : whole]
        self._out = max(self._out, whole)
        if full or (fresh and not held):
            self._slide(held)
        return fresh

    def finish(self) -> str:
        """What is left, with U+FFFD for bytes that became no character."""
        rest = self._decode()[self._out :]
        self._out += len(rest)
        return rest

    def _slide(self, held: int) -> None:
        """Let the context go; what is out now is the new one, but for the last `held` characters."""
        del self._ids[: self._context]
        self._context = len(self._ids)
        self._out = max(0, len(self._decode()) - held)

    def _silent(self, token: int) -> bool:
        """Control tokens that are not shown, and ids beyond the tokenizer's (a model may have more rows)."""
        hidden = self._skip_special and token in self._tokenizer.special_ids
        return hidden or self._tokenizer.core.id_to_token(token) is None

    def _context_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens: enough to begin and end with a whole character; none after a control token."""
        for size in range(CONTEXT, CONTEXT + HELD + 1):
            ids = list(prompt_ids[-size:])
            if not ids or ids[-1] in self._tokenizer.special_ids:
                break
            text = self._tokenizer.decode(ids, self._skip_special)
            if text and not text.startswith(UNDECODED) and not text.endswith(UNDECODED):
                return ids
        return []

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """One token's text by itself, control tokens and a SentencePiece word's space included."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    piece = tokenizer.core.id_to_token(token) or ""
    spaces = len(piece) - len(piece.lstrip("▁"))
    return " " * (spaces - (len(text) - len(text.lstrip(" ")))) + text


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for, also where they are a part of a character; a control token's spelling."""
    piece = tokenizer.core.id_to_token(token) or ""
    if tokenizer.byte_level:
        if all(sign in ALPHABET for sign in piece):
            return bytes(ALPHABET[sign] for sign in piece)
    elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return token_text(tokenizer, token).encode("utf-8", "replace")


def _alphabet() -> dict[str, int]:
    """GPT-2's (encoder.py, bytes_to_unicode): a printable character for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = _alphabet()


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string begins that ends first, as if the text came letter by letter; of several, the longest."""
    found = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1:] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string could begin."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
