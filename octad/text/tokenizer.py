"""Tokenizer: text to ids and back, and chats to text, without transformers.

    tokenizer = Tokenizer.from_directory("model/")           # GGUF files: checkpoint/gguf/vocabulary.py
    ids = tokenizer.encode("Hello", add_special_tokens=True)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    tokenizer.save("output/")                                # transformers' AutoTokenizer loads what this writes

A tokenizer is the hub's tokenizer.json plus a few facts that lie beside it: the named tokens, the chat
template and the ids that end a generation. Text that comes from outside can contain the spelling of a control
token; `encode` with parse_special=False reads that as plain text, and `encode_chat` does so for everything
inside the messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from octad.errors import CheckpointError, DataError
from octad.guard import read_bytes, read_object
from octad.text.tokenizer_file import check_ids, read_core

Message = Mapping[str, Any]
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LONG_TEXT = 1 << 13  # characters
MOST_IDS = 1 << 22  # the largest vocabularies of the hub have some 300,000
_BYTE = re.compile(r"^<0x[0-9A-Fa-f]{2}>$")
_MARK = (
    "\ufdd0"  # a Unicode noncharacter: keeps a control token's spelling apart while a template is rendered
)


class TextSink(Protocol):
    """Anything that takes named text files, such as a CheckpointWriter."""

    def add_text(self, file: str, text: str) -> object:
        """Add one file."""


class Tokenizer:
    """Encodes and decodes with a `tokenizers` object; `config` and `generation` are the JSON files saved
    beside it.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        eos_ids: Iterable[int],
        generation: Mapping[str, Any] | None = None,
        label: str = "tokenizer",
    ) -> None:
        self.core, self.label = core, label
        self.config, self.generation = dict(config), dict(generation or {})
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self._mark_named_special()

    # ---- making --------------------------------------------------------------------------------------------

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json and what lies beside it. Raises CheckpointError where it is missing or damaged."""
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            fix = "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            raise CheckpointError(f"{directory}: tokenizer.json is missing; {fix}")
        core = read_core(file)
        config = _optional(directory / "tokenizer_config.json")
        config |= {"chat_template": _chat_template(directory, config)}
        generation = _optional(directory / "generation_config.json")
        try:
            ends = _end_ids(core, config, generation, _optional(directory / "config.json"))
        except ValueError as error:
            raise CheckpointError(
                f"{directory}: eos_token_id should be an id or a list of them, {error}"
            ) from None
        made = cls(core, config, ends, generation, str(path))
        if made.vocab_size > MOST_IDS:  # the library goes through all numbers below the largest
            raise CheckpointError(
                f"{file}: damaged: gives a token the id {made.vocab_size - 1:,}; ids below {MOST_IDS:,} are read"
            )
        check_ids(made.texts, made.core, str(file))
        return made

    # ---- text and ids --------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = False, *, parse_special: bool = True) -> list[int]:
        """Ids of a text. `add_special_tokens` adds what the model wants around a text (bos).

        With parse_special=False the spelling of a control token in the text is plain text, not the token.
        """
        core = self._reader([text], parse_special)
        try:
            if len(text) > LONG_TEXT:  # a batch is read without the interpreter's lock: other threads go on
                (found,) = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                found = core.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = found.ids
        except TypeError:
            raise DataError(_no_text(text)) from None
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a person typed: what the model wants before it, and spellings of control tokens as text."""
        return self.encode(text, add_special_tokens=True, parse_special=False)

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = False, *, parse_special: bool = True
    ) -> list[list[int]]:
        """`encode` of many texts, in parallel where the library's threads allow."""
        core = self._reader(texts, parse_special)
        try:
            return [e.ids for e in core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]
        except TypeError:
            wrong = next(text for text in texts if _no_text(text))
            raise DataError(_no_text(wrong)) from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; bytes that are no whole character become U+FFFD."""
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    @property
    def vocab_size(self) -> int:
        """One more than the largest id (the model's embedding may have more rows)."""
        return max(self.texts, default=-1) + 1

    @cached_property
    def texts(self) -> dict[int, str]:
        """What each id is spelled as in tokenizer.json, added tokens too."""
        return {i: text for text, i in self.core.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens are spelled in GPT-2's alphabet, a character a byte."""
        decoder = self.core.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def byte_lengths(self) -> list[int]:
        """For each id, the UTF-8 bytes that it stands for in running text; their sum over a text is the text's size."""
        added, byte_level = self.core.get_added_tokens_decoder(), self.byte_level

        def length(i: int) -> int:
            if i in added:
                return len(added[i].content.encode())
            token = self.texts.get(i, "")
            if byte_level:
                return len(token)  # one character of the byte alphabet a byte
            return len(_BYTE.sub("x", token.replace("\u2581", " ")).encode())

        return [length(i) for i in range(self.vocab_size)]

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, where there is one."""
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text by the tokenizer's own word (`eos_ids` are all that end a generation)."""
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The id that fills up a batch, where there is one."""
        return self._named_id("pad_token")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens: what decode leaves out, and what plain text should not produce."""
        added = self.core.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    # ---- chats ---------------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, or None for a model without one."""
        return self.config.get("chat_template") or None

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as text, as the model was trained to read it. `variables` (tools=..., enable_thinking=...)
        reach the template; continue_final_message=True leaves the last message open at its end. Contents may be lists of
        text parts or None.

        Raises DataError for messages that are malformed or that the template refuses, CheckpointError for a
        model without a template or with a broken one.
        """
        if self.chat_template is None:
            raise CheckpointError(
                f"{self.label}: has no chat template; give plain text, or use an instruct model as base"
            )
        named = {name: text for name in NAMED_TOKENS if (text := self._named_text(name)) is not None}
        context = {**named, "tools": None, "documents": None, **variables}
        from octad.text.chat_template import render_chat  # late: it needs jinja2

        context |= {"add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template, messages, context, self.label)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a chat in which only the template can produce control tokens, never the text of messages or tools.

        Raises as apply_chat_template does."""
        added = self.core.get_added_tokens_decoder()
        special = {added[i].content: i for i in self.special_ids if added[i].content}
        masked = {text: text[0] + _MARK + text[1:] for text in sorted(special, key=len, reverse=True)}
        chat = [_map_strings(message, masked) for message in messages]
        given = {name: _map_strings(value, masked) for name, value in variables.items()}
        rendered = self.apply_chat_template(chat, add_generation_prompt, **given)
        ids: list[int] = []
        for part in _split_at(rendered, list(masked)):
            if part in special:
                ids.append(special[part])
            else:
                ids += self.encode(_restore(part, masked), parse_special=False)
        return ids

    # ---- saving --------------------------------------------------------------------------------------------

    def files(self) -> dict[str, str]:
        """The files that transformers, vLLM and `from_directory` read, by name."""
        config = {
            k: v for k, v in self.config.items() if v is not None and k not in ("auto_map", "tokenizer_file")
        }
        named = {name: text for name in NAMED_TOKENS if (text := self._named_text(name)) is not None}
        config |= named | {"tokenizer_class": "PreTrainedTokenizerFast"}
        ids = {
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
        }
        generation = self.generation | {name: value for name, value in ids.items() if value is not None}
        return {
            "tokenizer.json": self.core.to_str(pretty=True),
            "tokenizer_config.json": _to_json(config),
            "special_tokens_map.json": _to_json(named),
            "generation_config.json": _to_json(generation),
        }

    def save(self, target: TextSink | str | Path) -> None:
        """Write `files` into a directory, or into a writer that has `add_text(file, text)`."""
        for name, text in self.files().items():
            if isinstance(target, (str, Path)):
                (Path(target) / name).write_text(text, encoding="utf-8")
            else:
                target.add_text(name, text)

    # ---- inside --------------------------------------------------------------------------------------------

    def _reader(self, texts: Sequence[str], parse_special: bool) -> tokenizers.Tokenizer:
        """The tokenizer that reads these texts: where no control token is spelt, either one gives the same ids, and the
        second one need not be made."""
        if parse_special or not any(spelt in text for text in texts if text for spelt in self._spellings):
            return self.core
        return self._plain_core

    @cached_property
    def _spellings(self) -> list[str]:
        """Of the control tokens; "" (in every text) for one that is looked for in another form of the text."""
        tokens = [token for token in self.core.get_added_tokens_decoder().values() if token.special]
        plain = self.core.normalizer is None
        return [token.content if plain or not token.normalized else "" for token in tokens]

    @cached_property
    def _plain_core(self) -> tokenizers.Tokenizer:
        """A second tokenizer that reads control tokens' spellings as text: the switch is per object."""
        core = tokenizers.Tokenizer.from_str(self.core.to_str())
        core.encode_special_tokens = True
        return core

    def _named_text(self, name: str) -> str | None:
        return _text(self.config.get(name))

    def _named_id(self, name: str) -> int | None:
        text = self._named_text(name)
        return None if text is None else self.core.token_to_id(text)

    def _mark_named_special(self) -> None:
        """transformers makes every named token special; a tokenizer.json that forgot one is brought into
        line.
        """
        added = self.core.get_added_tokens_decoder()
        for name in NAMED_TOKENS:
            text, token = self._named_text(name), self._named_id(name)
            if text is not None and token is not None and not (token in added and added[token].special):
                self.core.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _no_text(text: Any) -> str:
    """Why this cannot be encoded; "" where it can."""
    if not isinstance(text, str):
        return f"expected a text, found {type(text).__name__}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "the text holds half of a surrogate pair, which is no text; remove it"
    return ""


def _text(token: Any) -> str | None:
    """A named token is a string, or an object with the string under `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's; of several, the one named default."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return read_bytes(file).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 text (byte {error.start})") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        try:
            named = {str(entry["name"]): entry["template"] for entry in template}
        except (TypeError, KeyError):
            named = {"": template}  # neither a template
        template = named.get("default") or next(iter(named.values()), None)
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{directory}: tokenizer_config.json has a chat_template that is no text")
    return template


def _end_ids(
    core: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    model: Mapping[str, Any],
) -> list[int]:
    """generation_config's ends and the tokenizer's eos; config.json's where both are silent."""
    text = _text(config.get("eos_token"))
    own = core.token_to_id(text) if text is not None else None
    ends = [*_id_list(generation.get("eos_token_id")), *([] if own is None else [own])]
    return ends or _id_list(
        None if model.get("eos_token_id") == -1 else model.get("eos_token_id")
    )  # -1: none


def _id_list(value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for found in ids:
        if type(found) is not int or not 0 <= found < 1 << 32:
            raise ValueError(f"found {str(found)[:80]!r}")
    return ids


def _split_at(text: str, spellings: Sequence[str]) -> list[str]:
    """The text cut before and after each spelling; empty pieces left out."""
    if not spellings:
        return [text]
    return [part for part in re.split(f"({'|'.join(map(re.escape, spellings))})", text) if part]


def _map_strings(value: Any, replacements: Mapping[str, str]) -> Any:
    """Apply the replacements to every string inside a message, however deep (content parts, tool calls)."""
    if isinstance(value, str):
        for old, new in replacements.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, Mapping):
        return {
            _map_strings(key, replacements): _map_strings(item, replacements) for key, item in value.items()
        }
    return [_map_strings(item, replacements) for item in value] if isinstance(value, (list, tuple)) else value


def _restore(text: str, replacements: Mapping[str, str]) -> str:
    if _MARK in text:
        for old, new in replacements.items():
            text = text.replace(new, old)
    return text


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    return read_object(path) if path.is_file() else {}


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
