"""The command line end to end on tiny models, and every mistake of a user: one line, exit code 2, nothing left behind."""

import inspect
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from members import adapter, edit_config, full_member, make_base, save_tokenizer, text_file
from safetensors.torch import load_file, save_file
from tiny_models import Octad, Outcome

from octad.cli.combining import expert_app
from octad.cli.main import app
from octad.kernels.compile import runnable
from octad.report import terminal


class World:
    """A base, two members of it, text for each, a recipe, and the mixture that the command line makes of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = make_base(directory / "base", "llama")
        self.lora = adapter(self.base, directory / "lora", 1)
        self.full = full_member(self.base, directory / "full", 2, only=".mlp.")
        self.text = [text_file(directory, seed) for seed in range(4)]
        self.recipe = self.write(directory / "recipe.yaml")
        domains = {"domains": {"one": self.text[0].name, "two": [self.text[1].name, self.text[2].name]}}
        self.domains = directory / "domains.yaml"
        self.domains.write_text(yaml.safe_dump(domains))
        self.mixture = directory / "mixture"

    def write(self, path: Path, **changes: Any) -> Path:
        """The recipe, with other keys; references are absolute paths."""
        members = (("general", "base"), ("lora", self.lora), ("full", self.full))
        experts = [
            {"name": n, "model": str(m), "data": str(self.text[i])} for i, (n, m) in enumerate(members)
        ]
        raw = {"base": str(self.base), "experts": experts, "router": {"tokens": 200, "window": 64}}
        path.write_text(yaml.safe_dump(raw | changes))
        return path

    def experts(self, place: int, **changes: Any) -> list[dict[str, Any]]:
        """The recipe's experts, one of them changed."""
        experts: list[dict[str, Any]] = yaml.safe_load(self.recipe.read_text())["experts"]
        experts[place] |= changes
        return experts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def mixture(world: World, octad: Octad) -> Path:
    if not world.mixture.exists():
        code, _, err = octad("combine", world.recipe, "-o", world.mixture)
        assert code == 0, err
    return world.mixture


def names(directory: Path) -> list[str]:
    return [e["name"] for e in json.loads((directory / "octad.json").read_text())["experts"]]


def in_process(*arguments: object) -> Outcome:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "octad.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return done.returncode, done.stdout, done.stderr


# ---- what works ----------------------------------------------------------------------------------------------


def test_dry_run_tells_and_writes_nothing(world: World, octad: Octad, tmp_path: Path) -> None:
    code, out, err = octad("combine", world.recipe, "--dry-run", "-o", tmp_path / "m")
    assert (code, err) == (0, "")
    for part in ("general", "lora", "full", "exactly", "3 experts, top-2"):
        assert part in out
    assert not list(tmp_path.iterdir())


def test_names_and_paths_are_printed_as_they_are(world: World, octad: Octad, tmp_path: Path) -> None:
    """Brackets are no markup, and a path is on one line, however long."""
    experts = [*world.experts(1, name="[bold]lora"), {"name": "last", "model": "base"}]
    recipe = world.write(tmp_path / "r.yaml", experts=experts, router={"method": "random"}, shared="mean")
    output = tmp_path / "[red]" / ("long-" * 30)
    code, out, err = octad("combine", recipe, "-o", output)
    assert code == 0, err
    assert "\n[bold]lora " in out
    assert f"wrote {output} in" in out
    assert (
        "  shared: mean changes nothing: every member's attention, norms and embeddings are the base's" in out
    )


def test_combine_writes_what_transformers_loads(mixture: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert model.config.num_local_experts == 3
    assert names(mixture) == ["general", "lora", "full"]
    assert not list(mixture.parent.glob(".*incomplete*"))


def test_overwrite(world: World, octad: Octad, tmp_path: Path) -> None:
    output = tmp_path / "m"
    output.mkdir()
    (output / "old").touch()
    refused(octad("combine", world.recipe, "-o", output, "--overwrite"), str(output))  # no model: left alone
    assert (output / "old").exists()
    (output / "config.json").write_text("{}")
    assert octad("combine", world.recipe, "-o", output, "--overwrite")[0] == 0
    assert names(output) == ["general", "lora", "full"]
    assert not (output / "old").exists()


def test_experts_come_change_and_go(world: World, mixture: Path, octad: Octad, tmp_path: Path) -> None:
    four = tmp_path / "four"
    new = ("--model", world.full, "--data", world.text[3])
    code, out, err = octad("expert", "add", mixture, "--name", "new", *new, "-o", four)
    assert code == 0, err
    assert str(four) in out.replace("\n", "")
    assert names(four) == ["general", "lora", "full", "new"]
    assert octad("expert", "remove", four, "--name", "full")[0] == 0  # in place
    assert names(four) == ["general", "lora", "new"]
    lora = ("--model", world.lora, "--data", world.text[3])
    assert octad("expert", "replace", four, "--name", "new", *lora, "-o", tmp_path / "m")[0] == 0
    assert json.loads((tmp_path / "m" / "octad.json").read_text())["experts"][2]["kind"] == "adapter"
    assert names(mixture) == ["general", "lora", "full"]
    assert {p.name for p in tmp_path.iterdir()} == {"four", "m"}


def test_inspect(world: World, mixture: Path, octad: Octad) -> None:
    code, out, err = octad("inspect", mixture, "--against", world.base)
    assert (code, err) == (0, "")
    assert "mixtral" in out
    assert "lora" in out
    assert octad("inspect", world.base)[0] == 0


def test_inspect_shows_the_machine(octad: Octad) -> None:
    """The path that the kernels take here is among those that run, and a model is another question."""
    code, out, err = octad("inspect", "--machine", "--json")
    assert code == 0, err
    kernels = json.loads(out)["kernels"]
    assert kernels["used"] == kernels["run_here"][0] == runnable()[0]
    assert {"amx", *kernels["run_here"]} <= set(kernels["known"]) or "portable" in kernels["run_here"]
    code, out, err = octad("inspect", "--machine")
    assert code == 0, err
    assert kernels["used"] in out
    refused(octad("inspect"), "--machine")
    refused(octad("inspect", "somewhere", "--machine"), "either a model")


def test_inspect_as_json(world: World, mixture: Path, octad: Octad) -> None:
    code, out, err = octad("inspect", mixture, "--against", world.base, "--json")
    found = json.loads(out)
    assert (code, err, found["experts"]) == (0, "", 3)
    assert found["comparison"]["experts"][0]["mean"] == 0
    assert found["comparison"]["experts"][1]["mean"] > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert found["parameters"] == model.num_parameters()


def test_evaluate_as_json(world: World, mixture: Path, octad: Octad) -> None:
    arguments = ("--data", world.domains, "--tokens", 100, "--window", 32)
    code, out, _ = octad("evaluate", mixture, *arguments, "--json")
    found = json.loads(out)
    assert code == 0
    rows = ["general", "lora", "full", "soup", "ensemble", "oracle"]
    rows += ["mixture top-1", "mixture top-2", "mixture top-3"]
    assert [row["name"] for row in found["contestants"]] == rows
    assert all(set(row["bits_per_byte"]) == {"one", "two"} for row in found["contestants"])
    code, out, _ = octad("evaluate", mixture, *arguments)
    assert code == 0
    assert "oracle" in out
    assert "the best of its parts" in out  # the verdict's sentence, however it comes out


def test_evaluate_a_dense_model(world: World, octad: Octad) -> None:
    arguments = ("--data", world.domains, "--tokens", 100, "--window", 32)
    found = json.loads(octad("evaluate", world.base, *arguments, "--json")[1])
    assert [row["name"] for row in found["contestants"]] == ["model"]
    assert octad("evaluate", world.base, *arguments)[0] == 0


def test_generate(world: World, mixture: Path, octad: Octad) -> None:
    for model in (mixture, world.base):
        arguments = ("generate", model, "Once [upon]", "--max-tokens", 8, "--temperature", 1, "--seed", 3)
        first, again = octad(*arguments), octad(*arguments)
        assert first == again
        assert (first[0], first[2]) == (0, "")
        assert len(first[1]) > 1
        assert "Once [upon]" not in first[1]  # in a pipe the answer alone


def test_help_is_a_line_of_source() -> None:
    """A line's end in a docstring is one in --help, in the middle of a sentence."""
    commands = [*app.registered_commands, *expert_app.registered_commands]
    assert len(commands) > 15
    for command in commands:
        assert command.callback is not None
        first = inspect.getdoc(command.callback) or ""
        assert first.partition("\n\n")[0].count("\n") == 0, command.callback.__name__


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("demo", ["demo-output, with --base demo-base", "10", "quick"]),
        ("chat", ["512", "speakers"]),
        ("bench", ["none", "128,512", "1,4,16"]),
        ("export", ["5.0", "hf"]),
    ],
)
def test_help_says_all_that_it_is_given(
    octad: Octad, monkeypatch: pytest.MonkeyPatch, command: str, defaults: list[str]
) -> None:
    """At 80 columns: defaults in brackets stand there, flags take nothing, and no option's name is cut."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = octad(command, "--help")
    said = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert [text for text in defaults if f"[default: {text}]" not in said] == []
    assert [mark for mark in ("<bool>", "…") if mark in said] == []


def test_another_command_is_told_which_there_are(octad: Octad) -> None:
    code, _, err = octad("expert", "list")
    assert (code, err) == (2, "octad: No such command 'list'. There are add, replace, remove.\n")
    assert "Did you mean 'combine'?" in octad("combin")[2]


def test_flags_alone_are_no_command(octad: Octad) -> None:
    """As without any: the help, and exit code 2."""
    code, out, err = octad("-q")
    assert (code, "".join((out, err)).strip()) == (2, "".join(octad()[1:]).strip())
    assert "Usage:" in out


def test_version_and_help(octad: Octad) -> None:
    assert set(json.loads(octad("version")[1])) == {"octad", "torch", "safetensors", "tokenizers"}
    for arguments in (["--help"], [], ["expert"], ["combine", "--help"]):
        code, out, err = octad(*arguments)
        assert "Usage" in out + err
        assert code == (2 if arguments in ([], ["expert"]) else 0)
        assert "octad: " not in err


# ---- what does not: the recipe and what it names --------------------------------------------------------------


def refused(outcome: Outcome, *parts: str) -> None:
    code, _, err = outcome
    assert code == 2, err
    assert err.startswith("octad: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def nothing_left(directory: Path) -> None:
    found = [p.name for p in directory.iterdir()]
    assert "out" not in found
    assert not [name for name in found if "incomplete" in name]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"topk": 1}, ["unknown key 'topk'", "did you mean 'top_k'"]),
        ({"top_k": 4}, ["top_k is 4", "only 3 experts"]),
        ({"router": {"metod": "ridge"}}, ["'router.metod'", "'method'"]),
        ({"base": "no-such-model"}, ["no-such-model", "no such file or directory"]),
        ({"experts": "all"}, ["experts"]),
    ],
)
def test_mistakes_in_a_recipe(
    world: World, octad: Octad, tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    recipe = world.write(tmp_path / "recipe.yaml", **changes)
    refused(octad("combine", recipe, "-o", tmp_path / "out"), *parts)
    nothing_left(tmp_path)


def test_duplicate_names(world: World, octad: Octad, tmp_path: Path) -> None:
    recipe = world.write(tmp_path / "recipe.yaml", experts=world.experts(1, name="general"))
    refused(octad("combine", recipe, "-o", tmp_path / "out"), "two experts", "'general'")
    nothing_left(tmp_path)


DATA: list[tuple[str, bytes | None, list[str]]] = [
    ("missing.jsonl", None, ["no such file"]),
    ("empty.jsonl", b"", ["no document"]),
    ("empty.txt", b"", ["no document"]),
    ("short.jsonl", b'{"text": "x"}\n', ["no document"]),
    ("latin.txt", "été".encode("latin-1") * 50, ["not UTF-8"]),
    ("latin.jsonl", b'{"text": "\xe9t\xe9"}\n', ["not UTF-8"]),
    ("broken.jsonl", b'{"text": "fine"}\n{"text": "bro\n', ["line 2", "not JSON"]),
    ("keys.jsonl", b'{"content": "x"}\n', ["line 1", "'text'", "content"]),
    ("half.jsonl", b'{"text": "half of a \\ud83d pair"}\n', ["line 1", "surrogate"]),
    ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00", ["gzip"]),
    ("plain.txt.gz", b"not gzip at all", ["gzip"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), DATA, ids=[d[0] for d in DATA])
def test_bad_text(
    world: World,
    mixture: Path,
    octad: Octad,
    tmp_path: Path,
    name: str,
    content: bytes | None,
    parts: list[str],
) -> None:
    """As calibration text of a recipe and of a newcomer, and as text to judge on."""
    data, out = tmp_path / name, tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    recipe = world.write(tmp_path / "recipe.yaml", experts=world.experts(1, data=str(data)))
    refused(octad("combine", recipe, "-o", out), name, "expert 'lora'", *parts)
    new = ("--name", "new", "--model", world.full, "--data", data)
    refused(octad("expert", "add", mixture, *new, "-o", out), name, "expert 'new'", *parts)
    (tmp_path / "domains.yaml").write_text(yaml.safe_dump({"domains": {"one": name}}))
    refused(octad("evaluate", mixture, "--data", tmp_path / "domains.yaml"), name, "domain 'one'", *parts)
    nothing_left(tmp_path)


def truncated(member: Path) -> None:
    path = member / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def header_of_a_gigabyte(member: Path) -> None:
    path = member / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 30) + path.read_bytes()[8:])


def index(member: Path, shard: str) -> None:
    """An index that puts one tensor into `shard`, everything else where it is."""
    whole = (member / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    tensors = [name for name in json.loads(whole[8 : 8 + size]) if name != "__metadata__"]
    (member / "model.safetensors").rename(member / "model-00001-of-00002.safetensors")
    table = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {tensors[0]: shard}
    (member / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def not_a_number(member: Path) -> None:
    tensors = load_file(member / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, member / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "model.safetensors"),
    "header": (header_of_a_gigabyte, "model.safetensors"),
    "no shard": (lambda m: index(m, "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"),
    "above": (lambda m: index(m, "../base/model.safetensors"), "../base/model.safetensors"),
    "absolute": (lambda m: index(m, "/etc/passwd"), "/etc/passwd"),
    "bad index": (
        lambda m: (index(m, "x"), (m / "model.safetensors.index.json").write_text("{")),
        "index.json",
    ),
    "not a number": (not_a_number, "NaN"),
    "a billion layers": (
        lambda m: edit_config(m, num_hidden_layers=10**9),
        "num_hidden_layers is 1000000000",
    ),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "bad config": (lambda m: (m / "config.json").write_text("{"), "config.json"),
    "config of a list": (lambda m: (m / "config.json").write_text("[]"), "config.json"),
    "no family": (lambda m: edit_config(m, model_type="gpt2"), "gpt2"),
    "other config": (lambda m: edit_config(m, hidden_size=64, head_dim=8), "config.json asks for"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
    "other tokenizer": (lambda m: save_tokenizer(m, swap=True), "tokenizer"),
    "bad tokenizer": (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_members(world: World, mixture: Path, octad: Octad, tmp_path: Path, kind: str) -> None:
    damage, part = DAMAGE[kind]
    member = Path(shutil.copytree(world.full, tmp_path / "member"))
    damage(member)
    recipe = world.write(tmp_path / "recipe.yaml", experts=world.experts(2, model=str(member)))
    refused(octad("combine", recipe, "-o", tmp_path / "out"), part)
    new = ("--name", "new", "--model", member, "--data", world.text[3])
    refused(octad("expert", "add", mixture, *new, "-o", tmp_path / "out"), part)
    if "tokenizer" not in kind and kind not in ("other config", "not a number"):
        refused(octad("inspect", member), part)
    nothing_left(tmp_path)


def test_members_that_do_not_fit(world: World, mixture: Path, octad: Octad, tmp_path: Path) -> None:
    wide = make_base(tmp_path / "wide", "llama", intermediate_size=64)
    deep = make_base(tmp_path / "deep", "llama", hidden_size=48, num_hidden_layers=1)
    other = make_base(tmp_path / "other", "qwen3")
    foreign = adapter(deep, tmp_path / "foreign", 5)
    cases = ((wide, "intermediate_size"), (other, "qwen3"), (foreign, "another base"), (mixture, "mixtral"))
    for number, (model, part) in enumerate(cases):
        recipe = world.write(tmp_path / f"{number}.yaml", experts=world.experts(2, model=str(model)))
        refused(octad("combine", recipe, "-o", tmp_path / "out"), "expert 'full'", part)
        new = ("--name", "new", "--model", model, "--data", world.text[3])
        refused(octad("expert", "add", mixture, *new, "-o", tmp_path / "out"), "expert 'new'", part)
    refused(octad("inspect", mixture, "--against", deep), "same shape")
    refused(octad("inspect", mixture, "--against", other), "same shape")
    refused(octad("inspect", world.base, "--against", mixture), "dense")
    refused(octad("inspect", world.lora), "adapter")
    nothing_left(tmp_path)


# ---- what does not: arguments ---------------------------------------------------------------------------------


def test_outputs(world: World, mixture: Path, octad: Octad, tmp_path: Path) -> None:
    refused(octad("combine", world.recipe), "no output given", "-o")
    before = sorted(p.name for p in mixture.iterdir())
    refused(octad("combine", world.recipe, "-o", mixture), "exists")
    new = ("--name", "new", "--model", world.full, "--data", world.text[3])
    refused(octad("expert", "add", mixture, *new, "-o", world.base), "exists")
    weights = (world.full / "model.safetensors").read_bytes()
    for place in (world.full, world.base, world.directory):
        refused(octad("combine", world.recipe, "--overwrite", "-o", place), "which the recipe reads")
    assert (world.full / "model.safetensors").read_bytes() == weights
    refused(
        octad("combine", world.recipe, "--shard-size", "0", "-o", tmp_path / "out"), "--shard-size is 0 GB"
    )
    (tmp_path / "file").touch()
    refused(octad("combine", world.recipe, "-o", tmp_path / "file"), "exists")
    refused(octad("combine", world.recipe, "-o", tmp_path / "file" / "out"), "file")
    assert sorted(p.name for p in mixture.iterdir()) == before
    nothing_left(tmp_path)
    nothing_left(world.directory)


def test_expert_names(world: World, mixture: Path, octad: Octad, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    model = ("--model", world.full)
    data = ("--data", world.text[3])
    refused(octad("expert", "add", mixture, "--name", "lora", *model, *data, *out), "lora")
    refused(octad("expert", "add", mixture, "--name", "", *model, *data, *out), "name")
    refused(octad("expert", "add", mixture, "--name", "new", "--model", "", *data, *out), "model")
    refused(octad("expert", "add", mixture, "--name", "new", *model, *out), "needs data", "new")
    refused(octad("expert", "add", mixture, "--name", "new", "--model", "nowhere", *data, *out), "nowhere")
    refused(octad("expert", "remove", mixture, "--name", "welsh", *out), "welsh", "lora")
    refused(octad("expert", "replace", mixture, "--name", "welsh", *model, *data, *out), "welsh")
    refused(octad("expert", "remove", world.base, "--name", "x", *out), "base")
    refused(octad("expert", "remove", tmp_path / "none", "--name", "x", *out), "none")
    nothing_left(tmp_path)


def test_too_few_left(world: World, mixture: Path, octad: Octad, tmp_path: Path) -> None:
    two = tmp_path / "two"
    assert octad("expert", "remove", mixture, "--name", "full", "-o", two)[0] == 0
    refused(octad("expert", "remove", two, "--name", "lora"), "replace it")
    assert names(two) == ["general", "lora"]


def test_unknown_models(octad: Octad, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "empty").mkdir()
    for ref in ("nowhere", "some/where", tmp_path / "empty", world.domains, ""):
        refused(octad("inspect", ref))
        refused(octad("generate", ref, "Hello"))
        refused(octad("evaluate", ref, "--data", world.domains))


def test_domain_files(world: World, octad: Octad, tmp_path: Path) -> None:
    contents = ("", "domains: 3", "domains: {a: 3}", "domains: [", "domains: {a: []}", "- domains")
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.yaml"
        path.write_text(content)
        refused(octad("evaluate", world.base, "--data", path), path.name)
    refused(octad("evaluate", world.base, "--data", tmp_path / "none.yaml"), "none.yaml")


def test_prompts_and_options(world: World, mixture: Path, octad: Octad) -> None:
    refused(octad("generate", mixture, ""), "prompt is empty")
    refused(octad("generate", mixture, " \n "), "prompt is empty")
    refused(octad("generate", mixture, "x" * 500), "500 tokens", "128")
    refused(octad("generate", mixture, "hello", "--chat"), "template")
    refused(octad("generate", mixture, "x", "--max-tokens", 0), "max-tokens")
    refused(octad("generate", mixture, "x", "--temperature", "hot"), "temperature")
    refused(octad("generate", mixture), "prompt")
    refused(octad("inspect", mixture, "--josn"), "--josn")
    refused(octad("combine", world.recipe, "-o"), "-o")
    refused(octad("inspekt", mixture), "inspekt")
    refused(octad("expert", "ad", mixture), "ad")


def test_a_damaged_mixture(mixture: Path, octad: Octad, world: World, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mixture, tmp_path / "copy"))
    (copy / "octad.json").write_text("{}")
    refused(octad("inspect", copy), "octad.json")
    refused(octad("evaluate", copy, "--data", world.domains), "octad.json")
    refused(octad("generate", copy, "hello"), "octad.json")
    refused(octad("expert", "remove", copy, "--name", "lora"), "octad.json")


# ---- the same from outside -----------------------------------------------------------------------------------


def test_in_a_process_of_its_own(world: World, mixture: Path, tmp_path: Path) -> None:
    code, out, err = in_process("inspect", mixture, "--json")
    assert (code, json.loads(out)["experts"], err) == (0, 3, "")
    data = tmp_path / "broken.jsonl"
    data.write_text("{")
    recipe = world.write(tmp_path / "recipe.yaml", experts=world.experts(1, data=str(data)))
    refused(in_process("combine", recipe, "-o", tmp_path / "out"), "line 1", "not JSON")
    nothing_left(tmp_path)
    refused(in_process("inspect", "nowhere"), "nowhere")


def test_a_bug_keeps_its_traceback(octad: Octad, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("octad.checkpoint.load.open_source", broken)
    with pytest.raises(ZeroDivisionError):
        octad("inspect", world.base)


def test_a_bar_shows_only_work_that_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress_bar():
        pass
    with pytest.raises(TypeError), terminal.progress_bar() as progress:
        progress("fitting", progress("fitting", 0.5) + 1)  # type: ignore[func-returns-value, operator]
    assert capsys.readouterr().err == ""
    with terminal.progress_bar() as progress:
        progress("fitting", 1.0)
    assert "fitting" in capsys.readouterr().err


def test_an_interruption(octad: Octad, monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("octad.checkpoint.load.open_source", stopped)
    code, _, err = octad("inspect", world.base)
    assert code == 130
    assert err.startswith("octad: interrupted")


def test_where_the_reader_of_the_output_has_gone(world: World) -> None:
    """As behind `| head`: exit code 1 and not a word; a full disk is one line."""
    command = [sys.executable, "-m", "octad", "plan", "8x7b", "--json"]
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (found.returncode, found.stderr) == (1, "")
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "octad: standard output cannot be written (No space left on device)\n"
