"""Ends of answers that the model has no row for: said and left out, in every form of a checkpoint and on every road."""

import json
import shutil
from pathlib import Path

import pytest
from gguf_files import gguf_of
from members import VOCABULARY, full_member, make_base, make_recipe
from safetensors.torch import load_file

from octad.checkpoint.load import LeftOut, load_tokenizer, open_source
from octad.combine.build import combine
from octad.combine.preflight import preflight
from octad.engine.llm import LLM
from octad.engine.params import SamplingParams

OWN = VOCABULARY - 1  # the tokenizer's own end
FAR = VOCABULARY + 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("ends") / "base")


def ending(model: Path, directory: Path, ends: list[int]) -> Path:
    """A copy whose answers end at these ids, as generation_config.json and config.json say."""
    shutil.copytree(model, directory)
    for file in ("generation_config.json", "config.json"):
        raw = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(raw | {"eos_token_id": ends}))
    return directory


def test_said_and_left_out(base: Path, tmp_path: Path) -> None:
    source = open_source(ending(base, tmp_path / "far", [FAR, 2]))
    with pytest.warns(LeftOut, match=f"ends its answers at id {FAR}, but has {VOCABULARY} rows"):
        tokenizer = load_tokenizer(source)
    assert tokenizer.eos_ids == (2, OWN)
    assert json.loads(tokenizer.files()["generation_config.json"])["eos_token_id"] == [2, OWN]


def test_no_end_is_left(base: Path, tmp_path: Path) -> None:
    far = ending(base, tmp_path / "far", [FAR])
    (far / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.warns(LeftOut, match="nothing ends an answer now but its length"):
        tokenizer = load_tokenizer(open_source(far))
    assert tokenizer.eos_ids == ()
    assert "eos_token_id" not in json.loads(tokenizer.files()["generation_config.json"])


def test_minus_one_is_none(base: Path, tmp_path: Path) -> None:
    none = Path(shutil.copytree(base, tmp_path / "none"))
    raw = json.loads((none / "config.json").read_text())
    (none / "config.json").write_text(json.dumps(raw | {"eos_token_id": -1}))
    (none / "generation_config.json").unlink()
    (none / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert load_tokenizer(open_source(none)).eos_ids == ()


@pytest.mark.filterwarnings("ignore::octad.checkpoint.load.LeftOut")
def test_an_answer_with_a_least_length(base: Path, tmp_path: Path) -> None:
    """Ends are made impossible until then: an id past the rows was an IndexError there."""
    llm = LLM(ending(base, tmp_path / "far", [FAR]))
    answer = llm.generate("abc", SamplingParams(min_tokens=4, max_tokens=6, temperature=0))[0].outputs[0]
    assert 4 <= len(answer.token_ids) <= 6


@pytest.mark.filterwarnings("ignore::octad.checkpoint.load.LeftOut")
def test_a_mixture_has_none_of_them(base: Path, tmp_path: Path) -> None:
    """The base's goes from both files, a member's is said in a note of its own."""
    far = ending(base, tmp_path / "far", [2, FAR])
    member = ending(full_member(base, tmp_path / "one", 1, only=".mlp."), tmp_path / "two", [2, FAR + 1])
    entries = [{"name": "a", "model": "base"}, {"name": "b", "model": str(member)}]
    plan = preflight(make_recipe(far, entries, router={"method": "random"}))
    assert any(
        f"ends its answers at id {FAR + 1}, which is no token" in note for note in plan.reports[1].notes
    )
    made = combine(plan, tmp_path / "out")
    for file in ("generation_config.json", "config.json"):
        found = json.loads((made / file).read_text())["eos_token_id"]
        assert set(found if isinstance(found, list) else [found]) <= {2, OWN}
    assert load_file(made / "model.safetensors")["model.embed_tokens.weight"].shape[0] == VOCABULARY


def test_in_a_gguf_file(base: Path, tmp_path: Path) -> None:
    import gguf

    gguf_of(base, tmp_path / "base.gguf")
    reader = gguf.GGUFReader(tmp_path / "base.gguf", "r+")
    field = reader.get_field("tokenizer.ggml.eos_token_id")
    assert field is not None
    field.parts[field.data[0]][0] = FAR
    reader.data.flush()
    with pytest.warns(LeftOut, match=f"ends its answers at id {FAR}"):
        assert FAR not in load_tokenizer(open_source(tmp_path / "base.gguf")).eos_ids
