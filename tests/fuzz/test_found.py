"""What `make fuzz` found, and the damage that it does: small files, each refused in one line or read rightly."""

import json
import random
import struct
from pathlib import Path

import pytest
from members import make_base, save_tokenizer

from octad.checkpoint.hf import open_weights
from octad.checkpoint.load import open_source
from octad.engine.opened import expert_names
from octad.errors import CheckpointError, DataError
from octad.text.corpus import open_documents
from octad.text.tokenizer import Tokenizer
from octad.train.learner import _earlier
from octad.train.routing_plot import draw_run, read_log

HERE = Path(__file__).parent


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize("end", ["a", "", {}, [None], [1.5], True, -1, 10**20, [["a"]], "../../etc/passwd"])
def test_ends_that_are_no_ids(directory: Path, end: object) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(CheckpointError, match="eos_token_id should be an id or a list of them, found"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize(
    "template", [5, {"default": "x"}, ["x"], [{"name": "default"}], [{"name": "a", "template": 1}]]
)
def test_chat_templates_that_are_no_text(directory: Path, template: object) -> None:
    raw = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(raw | {"chat_template": template}))
    with pytest.raises(CheckpointError, match="has a chat_template that is no text"):
        Tokenizer.from_directory(directory)


def test_a_chat_template_that_is_not_utf8(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"{{ m }}\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8 text \(byte 7\)"):
        Tokenizer.from_directory(directory)


def test_a_vocabulary_with_an_id_beyond_all(directory: Path) -> None:
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["vocab"]["a"] = 2**31
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="damaged: gives a token the id 2,147,483,648"):
        Tokenizer.from_directory(directory)


@pytest.mark.parametrize("name", ["x" * 300, "\u00e9" * 200, "a/" + "b" * 256])
def test_an_index_with_a_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no file can have the name"):
        open_weights(tmp_path)


def test_a_log_that_was_damaged(tmp_path: Path) -> None:
    good = [{"step": n, "bits_per_byte": {"one": 2.0}} for n in (1, 2)]
    lines = [json.dumps(record).encode() for record in good]
    (tmp_path / "log.jsonl").write_bytes(
        b"\n".join([lines[0], b'{"loss": 1}', b"\xff", b"[1]", lines[1], b'{"st'])
    )
    assert read_log(tmp_path / "log.jsonl") == good
    (tmp_path / "log.jsonl").write_text('{"step": 1, "layers": [{"dead": 5}]}\n')
    assert "holds what no run writes" in draw_run(tmp_path)
    assert not (tmp_path / "routing.svg").exists()


def test_an_error_is_one_line_whatever_it_names() -> None:
    assert (
        str(CheckpointError("a\u202e\n\ud800\0: \u00e9t\u00e9")) == "a\\u202e\\n\\ud800\\x00: \u00e9t\u00e9"
    )
    assert len(str(CheckpointError("x" * 10_000))) < 2000


def test_a_history_of_training_that_was_damaged(tmp_path: Path) -> None:
    source = open_source(make_base(tmp_path / "base", num_hidden_layers=1))
    (tmp_path / "base" / "training.json").write_text('[{"task": "tune"}, ')
    with pytest.raises(CheckpointError, match=r"training\.json: is not valid JSON"):
        _earlier(source)
    (tmp_path / "base" / "training.json").write_text('{"task": "tune"}')
    with pytest.raises(CheckpointError, match="should hold a list, found dict; remove it"):
        _earlier(source)


def test_a_data_set_whose_rows_are_damaged(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 where a row's text lies, and lengths that lie, which would crash the process."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a river"}, {"text": "bridges"}]).save_to_disk(tmp_path / "set")
    path = next((tmp_path / "set").glob("data-*.arrow"))
    path.write_bytes(path.read_bytes().replace(b"bridges", b"\xff\xffidges"))
    with pytest.raises(DataError, match=r"row \d: cannot be read"):
        list(open_documents(tmp_path / "set").read("text", None))
    offsets = struct.pack("<3i", 0, 7, 14)
    data = path.read_bytes().replace(b"\xff\xffidges", b"bridges")
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, struct.pack("<3i", 0, 7, 1 << 28)))
    with pytest.raises(DataError, match=r"row \d: cannot be read .*out of bounds"):
        list(open_documents(tmp_path / "set").read("text", None))


def test_the_same_seed_is_the_same_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    from mutate import mutated

    data = json.dumps({"a": [1, 2, {"b": "text"}], "c": 0.5}).encode()
    for kind in ("json", "yaml", "text", "binary"):
        made = [mutated(data, random.Random(seed), kind) for seed in range(200)]
        assert made == [mutated(data, random.Random(seed), kind) for seed in range(200)]
        assert len(set(made)) > 100


def test_a_mixture_whose_experts_are_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "octad.json").write_text('{"experts": ' + "[" * 3000)
    with pytest.raises(CheckpointError, match=r"octad\.json: is not valid JSON"):
        expert_names(tmp_path, 2)
