"""A damaged tokenizer.json is refused in one line: damage made by hand, to a tokenizer that the library trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_models import Octad, TinyCheckpoint
from tokenizers import decoders, models, pre_tokenizers, trainers

from octad.checkpoint.load import open_source
from octad.errors import CheckpointError
from octad.text.tokenizer import Tokenizer
from octad.text.tokenizer_file import check_rows

SPECIAL = ["<|end|>", "<|user|>"]
LATER = "<|later|>"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def learnt() -> str:
    """A byte-level BPE of 1,024 pieces, two of them special, and one that was added later, as tokenizer.json."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    core.train_from_iterator([path.read_text() for path in Path(__file__).parent.glob("test_*.py")], trainer)
    core.add_special_tokens([LATER])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)]
    )
    return core.to_str()


def written(directory: Path, learnt: str, change: Change = lambda file: None) -> Path:
    """A directory with the tokenizer.json after `change`."""
    file = json.loads(learnt)
    change(file)
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return directory


def vocab(file: dict[str, Any]) -> dict[str, int]:
    return file["model"]["vocab"]


def test_undamaged_it_is_read(tmp_path: Path, learnt: str) -> None:
    read = Tokenizer.from_directory(written(tmp_path, learnt))
    text = "def test(a): return 'é'"
    assert (
        read.encode(text) == tokenizers.Tokenizer.from_str(learnt).encode(text, add_special_tokens=False).ids
    )
    assert (read.vocab_size, read.decode(read.encode(text))) == (1025, text)
    check_rows(read, 1025)


def test_added_tokens_may_leave_ids_out(tmp_path: Path, learnt: str) -> None:
    """As tokenizers made of o200k_base do between <|endoftext|> and <|endofprompt|>."""

    def far(file: dict[str, Any]) -> None:
        vocab(file).update({LATER: 1024, "<|far|>": 1040})
        file["added_tokens"].append({**file["added_tokens"][-1], "content": "<|far|>", "id": 1040})

    read = Tokenizer.from_directory(written(tmp_path, learnt, far))
    assert (read.vocab_size, read.encode("a<|far|>")[-1]) == (1041, 1040)
    assert read.decode([1030]) == ""
    check_rows(read, 1024)  # a token that was added without a row is told where it is used
    check_rows(read, 1100)  # padded


DAMAGE: dict[str, tuple[Change, str]] = {
    "an added token's piece removed": (lambda f: vocab(f).pop(SPECIAL[1]), "gives '<|user|>' the id 1, but"),
    "a letter removed": (lambda f: vocab(f).pop("ÿ"), "gives '<|later|>' the id 1024, but by the vocabulary"),
    "a special token removed from both": (
        lambda f: (vocab(f).pop(SPECIAL[1]), f.update(added_tokens=f["added_tokens"][:1])),
        "no piece has the id 1",
    ),
    "an added token removed": (
        lambda f: f["added_tokens"].insert(2, {**f["added_tokens"][2], "content": "<|new|>"}),
        "gives '<|later|>' the id 1024, but by the vocabulary it is 1025",
    ),
    "two pieces of one id": (lambda f: vocab(f).update({"ÿ": vocab(f)["~"]}), "have one id"),
    "all ids one further": (
        lambda f: f["model"].update(vocab={piece: i + 1 for piece, i in vocab(f).items()}),
        "gives '<|end|>' the id 0, but by the vocabulary it is 1",
    ),
    "merges reversed": (lambda f: f["model"]["merges"].reverse(), "its merges do not make its pieces"),
    "merges removed": (lambda f: f["model"].update(merges=[]), "its merges do not make its pieces"),
    "half of the merges": (
        lambda f: f["model"].update(merges=f["model"]["merges"][:380]),
        "its merges do not make its pieces",
    ),
    "a merge of pieces that are none": (
        lambda f: f["model"]["merges"].append(["§§", "a"]),
        "out of vocabulary",
    ),
    "a piece that merges make removed": (
        lambda f: vocab(f).pop("".join(f["model"]["merges"][0])),
        "out of vocabulary",
    ),
    "how text becomes bytes removed": (
        lambda f: f.update(pre_tokenizer=None),
        "its pre_tokenizer does not say so",
    ),
    "how bytes become text removed": (lambda f: f.update(decoder=None), "its decoder does not say so"),
    "what is unknown unknown": (lambda f: f["model"].update(unk_token="<unk>"), "its unk_token is '<unk>'"),
    "another id put before texts": (
        lambda f: f["post_processor"]["special_tokens"][SPECIAL[0]].update(ids=[7]),
        "gives '<|end|>' the id 7, but by the vocabulary it is 0",
    ),
    "no model": (lambda f: f.pop("model"), "damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused(kind: str, tmp_path: Path, learnt: str) -> None:
    change, said = DAMAGE[kind]
    directory = written(tmp_path, learnt, change)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.from_directory(directory)
    message = str(error.value)
    assert message.startswith(f"{directory / 'tokenizer.json'}: damaged: ")
    assert said in message
    assert "copy the file again" in message
    assert "\n" not in message


@pytest.mark.parametrize("left", [0, 1, 1000])
def test_cut_short(left: int, tmp_path: Path, learnt: str) -> None:
    (tmp_path / "tokenizer.json").write_text(learnt[:left])
    with pytest.raises(CheckpointError, match="damaged"):
        Tokenizer.from_directory(tmp_path)


def test_whole_words_before_merges_hide_nothing(tmp_path: Path, learnt: str) -> None:
    """With ignore_merges a piece is found without a merge; merges are looked at all the same, the switch stays."""
    on: Change = lambda file: file["model"].update(ignore_merges=True)  # noqa: E731
    core = Tokenizer.from_directory(written(tmp_path, learnt, on)).core
    assert isinstance(core.model, models.BPE)
    assert core.model.ignore_merges
    both: Change = lambda file: (on(file), file["model"]["merges"].reverse())  # noqa: E731
    with pytest.raises(CheckpointError, match="do not make its pieces"):
        Tokenizer.from_directory(written(tmp_path, learnt, both))


def test_of_another_model(tmp_path: Path, learnt: str) -> None:
    read = Tokenizer.from_directory(written(tmp_path, learnt))
    with pytest.raises(
        CheckpointError, match="has 1025 ids, the model 256 rows: it is another model's; copy"
    ):
        check_rows(read, 256)
    with pytest.raises(
        CheckpointError, match="has 1025 ids, the model 2000 rows: it is another model's, or cut"
    ):
        check_rows(read, 2000)


def test_a_command_says_so_in_a_line(tiny_checkpoint: TinyCheckpoint, octad: Octad, learnt: str) -> None:
    model = tiny_checkpoint("llama")
    rows = open_source(model).config.vocab_size
    written(model, learnt)
    code, out, err = octad("generate", model, "a", "--max-tokens", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"has 1025 ids, the model {rows} rows: it is another model's" in err
