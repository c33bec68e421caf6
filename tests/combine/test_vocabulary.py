"""Vocabularies: whoever has the token has the row; others' tokens are compared in every form; templates and ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import sentencepiece_file
import torch
import transformers
from gguf_files import gguf_of
from members import (
    FFN,
    VOCABULARY,
    adapter,
    edit_config,
    extended,
    full_member,
    make_base,
    make_recipe,
    save_tokenizer,
    text_file,
)
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from octad.checkpoint.load import load_model, load_tokenizer, open_source
from octad.combine.build import combine
from octad.combine.edit import add_expert, remove_expert
from octad.combine.preflight import Plan, preflight
from octad.combine.recipe import ExpertSpec
from octad.engine.params import own_sampling
from octad.errors import CheckpointError, OctadError, RecipeError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE_ENDS = (2, VOCABULARY - 1)  # of generation_config.json, and the tokenizer's own
CHAT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("vocabulary") / "base")


def plan_of(base: Path, *models: Path | str, **changes: Any) -> Plan:
    entries = [{"name": f"m{e}", "model": str(model)} for e, model in enumerate(models)]
    return preflight(make_recipe(base, entries, **({"router": {"method": "random"}} | changes)))


def refused(base: Path, *models: Path | str, kind: type[OctadError] = RecipeError, **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        plan_of(base, *models, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def padded(model: Path, directory: Path, rows: int, *, seed: int = 7, tokens: tuple[str, ...] = ()) -> Path:
    """A copy with `rows` vocabulary rows: those past the tokens are noise, or cut off; `tokens` are added."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    draw = torch.Generator().manual_seed(seed)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            more = torch.randn(max(0, rows - len(tensors[name])), tensors[name].shape[1], generator=draw)
            tensors[name] = torch.cat((tensors[name], more))[:rows].contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, vocab_size=rows)
    save_tokenizer(directory, tokens)
    return directory


# ---- compared in every form ----------------------------------------------------------------------------------


def test_gguf_members(base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    gguf_of(other, tmp_path / "same.gguf")
    save_tokenizer(other, swap=True)
    gguf_of(other, tmp_path / "swapped.gguf")
    assert plan_of(base, "base", tmp_path / "same.gguf").reports[1].exact
    message = refused(base, "base", tmp_path / "swapped.gguf")
    assert "expert 'm1': token 0 is" in message
    assert "expert 'm1': token 0 is" in refused(tmp_path / "same.gguf", "base", other)


def test_rows_without_a_token_in_a_gguf(base: Path, tmp_path: Path) -> None:
    """The converter's [PAD257] is no token: another member may have one there."""
    wide = padded(base, tmp_path / "wide", VOCABULARY + 3)
    gguf_of(wide, tmp_path / "wide.gguf")
    named = padded(base, tmp_path / "named", VOCABULARY + 2, tokens=("<x>",))
    plan = plan_of(tmp_path / "wide.gguf", "base", named)
    mixture = combine(plan, tmp_path / "m")
    assert transformers.AutoTokenizer.from_pretrained(mixture).convert_tokens_to_ids("<x>") == VOCABULARY
    row = load_file(mixture / "model.safetensors")[EMBEDDING][VOCABULARY]
    assert torch.equal(row, load_file(named / "model.safetensors")[EMBEDDING][VOCABULARY])


def pieces(directory: Path) -> list[str]:
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    return [*sorted(vocabulary, key=vocabulary.__getitem__), "<|end|>"]


@pytest.mark.parametrize("form", ["tokenizer.model", "vocab.json"])
def test_older_forms(base: Path, tmp_path: Path, form: str) -> None:
    member, texts = full_member(base, tmp_path / "member", 1, only=".mlp."), pieces(base)
    (member / "tokenizer.json").unlink()

    def write(found: list[str]) -> None:
        if form == "tokenizer.model":
            (member / form).write_bytes(sentencepiece_file.model_of(found))
        else:
            (member / form).write_text(json.dumps({text: i for i, text in enumerate(found[:-1])}))
            (member / "added_tokens.json").write_text(json.dumps({found[-1]: len(found) - 1}))

    write(texts)
    assert plan_of(base, "base", member).reports[1].notes == ()
    write([*texts[:5], texts[6], texts[5], *texts[7:]])
    assert "expert 'm1': token 5 is" in refused(base, "base", member)
    write([*texts, "<more>"])
    padded(member, tmp_path / "more", VOCABULARY + 1)
    shutil.copy(member / form, tmp_path / "more" / form)
    if (member / "added_tokens.json").exists():
        shutil.copy(member / "added_tokens.json", tmp_path / "more")
    (tmp_path / "more" / "tokenizer.json").unlink()
    assert "save it as tokenizer.json" in refused(base, "base", tmp_path / "more")
    (member / form).write_bytes(b"\x0a\xff\xff")
    assert "expert 'm1'" in refused(base, "base", member)


def test_a_member_without_any_vocabulary(base: Path, tmp_path: Path) -> None:
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (member / file).unlink()
    assert "no tokenizer beside its weights" in plan_of(base, "base", member).reports[1].notes[0]


def test_text_that_is_cut_otherwise(base: Path, tmp_path: Path) -> None:
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    raw = json.loads((member / "tokenizer.json").read_text())
    raw["pre_tokenizer"]["add_prefix_space"] = True
    (member / "tokenizer.json").write_text(json.dumps(raw))
    assert "cuts text into other tokens" in plan_of(base, "base", member).reports[1].notes[0]


# ---- ids without rows ----------------------------------------------------------------------------------------


def test_a_base_whose_tokens_have_no_rows(base: Path, tmp_path: Path) -> None:
    short = shutil.copytree(base, tmp_path / "short")
    save_tokenizer(short, ("<say>", "<do>"))
    message = refused(short, "base", "base", kind=CheckpointError)
    assert "2 tokens for which the model has no row (the first is '<say>', id 257, of 257 rows)" in message
    member = padded(base, tmp_path / "member", VOCABULARY + 2, tokens=("<say>", "<do>"))
    mixture = combine(plan_of(short, "base", member), tmp_path / "m")  # a member brings the rows
    found = load_file(mixture / "model.safetensors")[EMBEDDING]
    assert torch.equal(found[VOCABULARY:], load_file(member / "model.safetensors")[EMBEDDING][VOCABULARY:])


def test_a_member_whose_new_tokens_have_no_rows(base: Path, tmp_path: Path) -> None:
    """A padding token that was added for training, and never resized for: left out, and said."""
    member = full_member(base, tmp_path / "member", 1, only=".mlp.")
    save_tokenizer(member, ("<pad>",))
    lora = adapter(base, tmp_path / "lora", 2, FFN)
    save_tokenizer(lora, ("<pad>",))
    plan = plan_of(base, "base", member, lora)
    for report in plan.reports[1:]:
        assert "knows 1 tokens that its 257 rows do not hold ('<pad>'): left out" in report.notes[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(combine(plan, tmp_path / "m"))
    assert len(tokenizer) == VOCABULARY
    both = padded(base, tmp_path / "both", VOCABULARY + 1, tokens=("<x>", "<pad>"))
    assert "no row for" in refused(base, "base", both)


def test_an_id_past_the_rows_is_never_read(base: Path, tmp_path: Path) -> None:
    from octad.combine.layer_parts import embedded
    from octad.text.windows import Window, batches

    windows = [Window((1, 2, VOCABULARY), 0, 0)]
    with pytest.raises(CheckpointError, match=f"token {VOCABULARY} has no row"):
        embedded(open_source(base), list(batches(windows, 64)), torch.float32)


# ---- rows are of who has the token ---------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["base", "linear", "ties"])
def test_padding_does_not_dilute_a_token(base: Path, tmp_path: Path, shared: str) -> None:
    """One member trained <x> in a row that is padding in the base and in another member."""
    wide = padded(base, tmp_path / "wide", VOCABULARY + 4)
    trained = padded(
        full_member(base, tmp_path / "t", 3), tmp_path / "trained", VOCABULARY + 4, seed=8, tokens=("<x>",)
    )
    other = padded(full_member(base, tmp_path / "o", 4), tmp_path / "other", VOCABULARY + 4, seed=9)
    mixture = combine(plan_of(wide, "base", trained, other, shared=shared), tmp_path / "m")
    found, theirs, ours = (load_file(d / "model.safetensors") for d in (mixture, trained, wide))
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(found[name][VOCABULARY], theirs[name][VOCABULARY])
        assert torch.equal(
            found[name][VOCABULARY + 1 :], ours[name][VOCABULARY + 1 :]
        )  # nobody's: the base's
        assert torch.equal(found[name][:VOCABULARY], ours[name][:VOCABULARY]) == (shared == "base")
    assert transformers.AutoTokenizer.from_pretrained(mixture).convert_tokens_to_ids("<x>") == VOCABULARY


@pytest.mark.parametrize("shared", ["base", "mean"])
def test_fewer_padding_rows(base: Path, tmp_path: Path, shared: str) -> None:
    wide = padded(base, tmp_path / "wide", VOCABULARY + 7)
    member = full_member(base, tmp_path / "member", 5, only=".mlp.")
    plan = plan_of(wide, "base", member, shared=shared)
    assert "has 7 rows of the vocabulary less than the base" in plan.reports[1].notes[0]
    assert plan.reports[1].lost == {}
    mixture = combine(plan, tmp_path / "m")
    found, ours = (load_file(d / "model.safetensors") for d in (mixture, wide))
    torch.testing.assert_close(found[EMBEDDING], ours[EMBEDDING])
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture)(tokens).logits
        torch.testing.assert_close(load_model(open_source(mixture))(tokens), theirs, rtol=1e-4, atol=1e-4)
    short = padded(base, tmp_path / "short", VOCABULARY - 1)
    assert "a member may add tokens, not lack them" in refused(wide, "base", short)


@pytest.mark.parametrize("shared", ["base", "linear"])
def test_an_adapter_on_a_resized_base(base: Path, tmp_path: Path, shared: str) -> None:
    """Two tokens were added and trained with modules_to_save: their rows, and the tokenizer, are the adapter's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    settings = peft.LoraConfig(r=4, target_modules=FFN, modules_to_save=["embed_tokens", "lm_head"])
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    save_tokenizer(tmp_path / "lora", ("<x>", "<y>"))
    mixture = combine(plan_of(base, "base", tmp_path / "lora", shared=shared), tmp_path / "m")
    found = load_file(mixture / "model.safetensors")
    tuned = adapted.base_model.model.model.embed_tokens.modules_to_save["default"].weight.detach()
    torch.testing.assert_close(found[EMBEDDING][VOCABULARY:], tuned[VOCABULARY:])
    assert transformers.AutoTokenizer.from_pretrained(mixture).convert_tokens_to_ids("<y>") == VOCABULARY + 1
    assert make_model("llama").config.vocab_size != VOCABULARY + 2


# ---- templates and ends --------------------------------------------------------------------------------------


def chatting(base: Path, directory: Path, seed: int, template: str, ends: list[int] | None = None) -> Path:
    full_member(base, directory, seed, only=".mlp.")
    raw = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(raw | {"chat_template": template}))
    if ends:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return directory


def ends_of(mixture: Path) -> list[tuple[int, ...]]:
    generation = json.loads((mixture / "generation_config.json").read_text())["eos_token_id"]
    config = json.loads((mixture / "config.json").read_text())["eos_token_id"]
    return [tuple([found] if isinstance(found, int) else found) for found in (generation, config)]


def test_sampling_goes_into_the_generation_config(base: Path, tmp_path: Path) -> None:
    made = combine(
        plan_of(base, "base", "base", sampling={"temperature": 0.25, "top_p": 0.9}), tmp_path / "m"
    )
    theirs = transformers.GenerationConfig.from_pretrained(made)
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.25, 0.9)
    assert own_sampling(load_tokenizer(open_source(made)).generation) == {"temperature": 0.25, "top_p": 0.9}
    assert set(theirs.eos_token_id) == {*BASE_ENDS}
    assert "temperature" in refused(base, "base", "base", sampling={"temperature": -1})
    plain = combine(plan_of(base, "base", "base"), tmp_path / "plain")
    assert transformers.GenerationConfig.from_pretrained(plain).temperature in (None, 1.0)


def test_what_members_agree_on_is_taken_over(base: Path, tmp_path: Path) -> None:
    models = [chatting(base, tmp_path / str(n), n, CHAT, [VOCABULARY - 1, 7]) for n in (1, 2)]
    plan = plan_of(base, "base", *models)
    assert "chat template: taken over from m1, m2; the base has none" in plan.notes
    assert any("answers also end at" in note for note in plan.notes)
    mixture = combine(plan, tmp_path / "m")
    chat = [{"role": "user", "content": "abc"}]
    theirs = transformers.AutoTokenizer.from_pretrained(mixture)
    assert theirs.apply_chat_template(chat, tokenize=False) == "abc<|end|>"
    assert load_tokenizer(open_source(mixture)).apply_chat_template(chat) == "abc<|end|>"
    assert [set(found) for found in ends_of(mixture)] == [{*BASE_ENDS, 7}] * 2
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert set(model.generation_config.eos_token_id) == {*BASE_ENDS, 7}


def test_where_members_disagree_the_recipe_chooses(base: Path, tmp_path: Path) -> None:
    one = chatting(base, tmp_path / "1", 1, CHAT, [VOCABULARY - 1, 7])
    two = chatting(base, tmp_path / "2", 2, "two" + CHAT, [VOCABULARY - 1, 8])
    plan = plan_of(base, "base", one, two)
    assert plan.tokenizer.chat_template == CHAT
    assert any(
        note.startswith("chat template: m1's; the base has none, and those of m2 differ")
        for note in plan.notes
    )
    assert any(
        "ends its answers at" in note and "chat_template: m2" in note for note in plan.reports[2].notes
    )
    assert set(plan.tokenizer.eos_ids) == {*BASE_ENDS, 7}
    plan = plan_of(base, "base", one, two, chat_template="m2")
    assert plan.tokenizer.chat_template == "two" + CHAT
    assert set(plan.tokenizer.eos_ids) == {*BASE_ENDS, 8}
    assert plan_of(base, "base", one, two, chat_template="base").tokenizer.chat_template is None
    line = refused(base, "base", one, base, chat_template="m2")
    assert "no chat template of its own; leave the key out, or name base" in line
    with pytest.raises(RecipeError, match="chat_template: no expert has the name 'm9'"):
        plan_of(base, "base", one, chat_template="m9")


def test_the_bases_own_template_stays_and_that_is_said(base: Path, tmp_path: Path) -> None:
    own = chatting(base, tmp_path / "own", 1, CHAT)
    other = chatting(base, tmp_path / "other", 2, "x" + CHAT)
    plan = plan_of(own, "base", other)
    assert plan.tokenizer.chat_template == CHAT
    assert plan.notes[0].startswith(
        "chat template: the base's; m1 have another: `chat_template: m1` takes that"
    )
    assert plan_of(own, "base", shutil.copytree(own, tmp_path / "same")).tokenizer.chat_template == CHAT


def test_a_member_that_adds_a_token_brings_no_template_along(base: Path, tmp_path: Path) -> None:
    own = chatting(base, tmp_path / "own", 1, CHAT)
    wide = extended(base, tmp_path / "wide", 3, ("<x>",))
    raw = json.loads((wide / "tokenizer_config.json").read_text())
    (wide / "tokenizer_config.json").write_text(
        json.dumps(raw | {"chat_template": "other", "eos_token": "<x>"})
    )
    plan = plan_of(own, "base", wide)
    assert (plan.tokenizer.chat_template, plan.tokenizer.vocab_size) == (CHAT, VOCABULARY + 1)
    assert plan.tokenizer.eos_id == VOCABULARY - 1


def test_a_newcomer_with_a_template(base: Path, tmp_path: Path) -> None:
    """The mixture has none: taken over with its ends; it has one: said."""
    mixture = combine(
        plan_of(base, "base", full_member(base, tmp_path / "f", 9, only=".mlp.")), tmp_path / "m"
    )
    told: list[str] = []
    text = (str(text_file(tmp_path, 1)),)
    one = ExpertSpec(
        name="one", model=str(chatting(base, tmp_path / "1", 1, CHAT, [VOCABULARY - 1, 7])), data=text
    )
    more = add_expert(mixture, one, tmp_path / "more", tell=told.append)
    assert any("chat template: taken over from one" in line for line in told)
    assert [set(found) for found in ends_of(more)] == [{*BASE_ENDS, 7}] * 2
    two = ExpertSpec(name="two", model=str(chatting(base, tmp_path / "2", 2, "x" + CHAT, [8])), data=text)
    most = add_expert(more, two, tmp_path / "most", tell=told.append)
    assert "two have another" in told[-2] + told[-1]
    assert [set(found) for found in ends_of(most)] == [{*BASE_ENDS, 7}] * 2
    assert load_tokenizer(open_source(most)).chat_template == CHAT


def test_whose_template_it_was_can_leave(base: Path, tmp_path: Path) -> None:
    """The recipe then no longer names anyone, and the mixture keeps the template."""
    one = chatting(base, tmp_path / "1", 1, CHAT)
    two = chatting(base, tmp_path / "2", 2, "two" + CHAT)
    mixture = combine(plan_of(base, "base", one, two, chat_template="m2"), tmp_path / "m")
    left = remove_expert(mixture, "m2", tmp_path / "left")
    assert load_tokenizer(open_source(left)).chat_template == "two" + CHAT
    assert "chat_template" not in json.loads((left / "octad.json").read_text())["recipe"]
