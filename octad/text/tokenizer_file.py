"""tokenizer.json from disk: what the `tokenizers` library reads without a word, and yet cannot be right, is refused.

    core = read_core(Path("model/tokenizer.json"))
    check_pieces(core, "model.gguf")          # what can be asked of a vocabulary from elsewhere
    check_rows(tokenizer, rows=49152)         # beside the model that it stands with

The library numbers added tokens anew where the file's ids do not fit, merges in whatever order the file has, and
leaves out what no piece stands for: ids of another text, with no error anywhere. All checks take some milliseconds:
they ask the made tokenizer and never parse the file's merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from octad.errors import CheckpointError

if TYPE_CHECKING:
    from octad.text.tokenizer import Tokenizer

AGAIN = "copy the file again from the model that it belongs to"
PROBED, FEWEST = 256, 64  # pieces tried, evenly over the vocabulary; of fewer nothing is concluded
LACKING = 256, 10  # rows without a token: so many, or a tenth of the rows; padding never reaches either
_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def read_core(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation or padding. Raises CheckpointError where it is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        core = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare Exception, and panics, which are none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise CheckpointError(f"{file}: damaged: {error}; {AGAIN}") from error
    core.no_truncation()
    core.no_padding()
    check_added(core, text, str(file))
    check_alphabet(core, str(file))
    check_unknown(core, str(file))
    check_pieces(core, str(file))
    return core


def check_ids(texts: Mapping[int, str], core: tokenizers.Tokenizer, label: str) -> None:
    """Each id below those of added tokens has one piece; added tokens may leave some out, as o200k's do. `texts` is the
    same vocabulary by id. Raises CheckpointError."""
    pieces = core.get_vocab_size(with_added_tokens=True)
    if pieces > len(texts):
        by_piece = core.get_vocab(with_added_tokens=True)
        one, i = next((piece, i) for piece, i in by_piece.items() if texts[i] != piece)
        raise CheckpointError(f"{label}: damaged: {one!r} and {texts[i]!r} have one id, {i}; {AGAIN}")
    if texts and len(texts) <= max(texts):
        last = max(texts.keys() - core.get_added_tokens_decoder().keys(), default=0)
        if (hole := next((i for i in range(last) if i not in texts), None)) is not None:
            raise CheckpointError(
                f"{label}: damaged: no piece has the id {hole} (ids of pieces reach {last}); {AGAIN}, or give that id a"
                f" piece of its own, such as '<unused{hole}>'"
            )


def check_added(core: tokenizers.Tokenizer, text: str, label: str) -> None:
    """Added tokens, and those put around a text, have the ids that the file gives them. Raises CheckpointError."""
    for token, said in (*_added(text), *_around(core)):
        found = core.token_to_id(token)
        if found != said:
            seen = "it has none in the vocabulary" if found is None else f"by the vocabulary it is {found}"
            raise CheckpointError(
                f"{label}: damaged: gives {token!r} the id {said}, but {seen}: an entry is missing, or one too many;"
                f" {AGAIN}"
            )


def check_alphabet(core: tokenizers.Tokenizer, label: str) -> None:
    """Pieces spelled in bytes' letters are read and written as such. Raises CheckpointError where one half is missing."""
    reads, writes = (
        part is not None and b'"ByteLevel"' in part.__getstate__()
        for part in (core.pre_tokenizer, core.decoder)
    )
    reads = reads or (core.normalizer is not None and b'"ByteLevel"' in core.normalizer.__getstate__())
    if reads != writes:
        lost = "decoder" if reads else "pre_tokenizer"
        raise CheckpointError(
            f"{label}: damaged: its pieces are spelled in bytes (ByteLevel), but its {lost} does not say so; {AGAIN}"
        )


def check_unknown(core: tokenizers.Tokenizer, label: str) -> None:
    """The piece that stands for what has no piece is one. Raises CheckpointError."""
    unknown = getattr(core.model, "unk_token", None)
    if unknown and core.model.token_to_id(unknown) is None:
        raise CheckpointError(
            f"{label}: damaged: its unk_token is {unknown!r}, which its vocabulary does not have; {AGAIN}"
        )


def check_pieces(core: tokenizers.Tokenizer, label: str) -> None:
    """Merges make the pieces that are there: most of some pieces, spelled out, come back as themselves.

    Of a vocabulary that was learnt nearly all do; where merges are another model's, missing, or in another order,
    fewer. Raises CheckpointError where more than a quarter do not."""
    model = core.model
    if not isinstance(model, tokenizers.models.BPE):
        return
    added = set(core.get_added_tokens_decoder())
    longer = [piece for piece in _spread(core) if core.token_to_id(piece) not in added]
    if len(longer) < FEWEST:
        return
    whole, model.ignore_merges = model.ignore_merges, False  # else a piece is found without a merge
    try:
        lost = [piece for piece in longer if len(model.tokenize(piece)) != 1]
    finally:
        model.ignore_merges = whole
    if 4 * len(lost) > len(longer):
        raise CheckpointError(
            f"{label}: damaged: its merges do not make its pieces ({len(lost)} of {len(longer)} that were tried, such as"
            f" {lost[0]!r}): some are missing, in another order, or another model's; {AGAIN}"
        )


def check_rows(tokenizer: Tokenizer, rows: int, *, added: bool = False) -> None:
    """The vocabulary is one of a model with so many rows: none of its pieces lies beyond, but for tokens added later
    (`added`: nor do they), and rows without a piece are no more than padding. Raises CheckpointError."""
    size = tokenizer.vocab_size
    said = f"{tokenizer.label}: its tokenizer has {size} ids, the model {rows} rows"
    if rows - size > max(LACKING[0], rows // LACKING[1]):
        raise CheckpointError(f"{said}: it is another model's, or cut short; {AGAIN}")
    if size > rows and set(tokenizer.texts) - set(range(rows)) - set(
        tokenizer.core.get_added_tokens_decoder()
    ):
        raise CheckpointError(f"{said}: it is another model's; {AGAIN}")
    if added and size > rows:
        raise CheckpointError(
            f"{tokenizer.label}: its tokenizer has the id {size - 1}, its embeddings {rows} rows; give it the tokenizer"
            " that it was trained with"
        )


def _spread(core: tokenizers.Tokenizer) -> list[str]:
    """Pieces of more than one letter, evenly over the ids."""
    size = core.get_vocab_size(with_added_tokens=False)
    pieces = (core.id_to_token(i) for i in range(0, size, max(1, size // PROBED)))
    return [piece for piece in pieces if piece and len(piece) > 1 and not _BYTE.fullmatch(piece)]


def _added(text: str) -> Iterator[tuple[str, int]]:
    """Added tokens and their ids as the file has them. In a string the key's quotes would be escaped."""
    if (found := _ADDED.search(text)) is None:
        return
    entries, _ = json.JSONDecoder().raw_decode(text, found.end())
    yield from ((entry["content"], entry["id"]) for entry in entries)


def _around(core: tokenizers.Tokenizer) -> Iterator[tuple[str, int]]:
    """The tokens that the file's post-processor puts around a text, and their ids."""
    if core.post_processor is None:
        return
    state: dict[str, Any] = json.loads(core.post_processor.__getstate__())
    for step in state.get("processors", [state]):
        for token in (step.get("special_tokens") or {}).values():
            yield from zip(token["tokens"], token["ids"], strict=True)
        yield from (tuple(step[name]) for name in ("sep", "cls") if step.get(name))
