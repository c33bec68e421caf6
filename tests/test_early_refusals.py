"""What cannot be is said before anything long begins or anything is shown: numbers as they are read, the rest from
config.json and headers."""

# ruff: noqa: F811 (fixtures are imported)

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import typer
from tiny_chat import NAMES, mixture, untaught  # noqa: F401
from tiny_models import Octad

from octad.cli.combining import expert_app
from octad.cli.main import app
from octad.cli.options import Verb


def _commands(group: typer.Typer, *before: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield (*before, command.name or command.callback.__name__), command
    for inner in group.registered_groups:
        yield from _commands(inner.typer_instance or app, *before, inner.name or "")


COMMANDS = dict(_commands(app))


def _arguments(callback: Any) -> list[str]:
    """What a command must be given, with names of things that are not there."""
    given: list[str] = []
    for name, parameter in inspect.signature(callback).parameters.items():
        if parameter.default is inspect.Parameter.empty and name != "ctx":
            option = isinstance(_info(callback, name), typer.models.OptionInfo)
            given += [f"--{name}", "nowhere"] if option else ["nowhere"]
    return given


def _info(callback: Any, name: str) -> Any:
    return get_args(get_type_hints(callback, include_extras=True)[name])[1]


def _numbers() -> Iterator[Any]:
    """Each option that is a number, with values that none can be."""
    for verb, command in COMMANDS.items():
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            kind = get_args(hint)[0] if get_args(hint) else hint
            kinds = [kind, *get_args(kind)]
            for wrong in ("nan", "inf", "-inf", "1e300") if float in kinds else ("1" + "0" * 30,):
                if (int in kinds or float in kinds) and get_origin(kind) is not list:
                    option = f"--{name.replace('_', '-')}"
                    yield pytest.param(verb, option, wrong, id=f"{' '.join(verb)} {option} {wrong}")


def test_all_commands_read_numbers_alike() -> None:
    assert expert_app in [group.typer_instance for group in app.registered_groups]
    assert {
        " ".join(verb) for verb, command in COMMANDS.items() if not issubclass(command.cls, Verb)
    } == set()


@pytest.mark.parametrize(("verb", "option", "value"), list(_numbers()))
def test_numbers_that_are_none(octad: Octad, tmp_path: Path, verb: Any, option: str, value: str) -> None:
    """Named by their option, though nothing else of the command line is there either."""
    code, out, err = octad(*verb, *_arguments(COMMANDS[verb].callback), f"{option}={value}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert option in err


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may read weights, or listen."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr("octad.engine.llm.open_fast", never)
    monkeypatch.setattr("octad.serve.running.run", never)


WRONG = [
    (("--quantize", "int3"), "'int3'"),
    (("--memory", "lots"), "--memory: found 'lots'"),
    (("--memory", "1GB"), "packed.octad"),
]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        *WRONG,
        (("--kv-cache-gb", "-1"), "kv_cache_gb"),
        (("--kv-cache-gb", "0"), "kv_cache_gb"),
        (("--max-model-len", "385"), "context is 384"),
        (("--dtype", "int7"), "dtype"),
        (("--device", "tpu"), "device"),
    ],
)
def test_there_is_no_page(octad: Octad, mixture: Path, options: Any, part: str) -> None:
    code, out, err = octad("serve", mixture, "--port", 0, *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert part in err


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("options", "part"),
    [*WRONG, (("--only", "frnch"), "did you mean french?"), (("--only", "nix"), NAMES[2])],
)
def test_no_weight_is_read(octad: Octad, mixture: Path, options: Any, part: str) -> None:
    for verb in (["generate", mixture, "Hello"], ["chat", mixture]):
        code, out, err = octad(*verb, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert part in err


@pytest.mark.usefixtures("unread")
def test_nor_for_a_prompt_or_a_form_that_cannot_be(
    octad: Octad,
    mixture: Path,
    untaught: Path,
    tmp_path: Path,
) -> None:
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps({"messages": [{"role": "nobody", "content": "Hi"}]}))
    for command, part in (
        (("generate", untaught, "Hello", "--routes"), "is dense"),
        (("generate", untaught, "Hello", "--only", "french"), "is dense"),
        (("generate", untaught, "Hello", "--chat"), "template"),
        (("generate", mixture, "x" * 500), "500 tokens"),
        (("generate", mixture, "x", "--regex", "("), "unclosed group"),
        (("chat", mixture, "--load", talk), "'nobody'"),
    ):
        code, out, err = octad(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert part in err


def test_plans_are_told_once_nothing_is_left_to_refuse(
    octad: Octad, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the model, its cost is announced here. Text is not opened for an output that cannot be."""
    monkeypatch.setattr("octad.api.forms.WORTH_SAYING", 0.0)
    there = tmp_path / "there"
    there.mkdir()
    (there / "config.json").write_text("{}")
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"GGUF")
    no_text = ("--data", tmp_path / "none.yaml")
    for command, part in (
        (("quantize", mixture, "-o", there, *no_text), "exists"),
        (("quantize", mixture, "-o", mixture, "--overwrite", *no_text), "is itself what is read"),
        (("quantize", mixture, "-o", tmp_path / "out", "--to", "int3", *no_text), "'int3'"),
        (("quantize", mixture, "-o", tmp_path / "out", "--shard-size", "-1", *no_text), "--shard-size"),
        (("export", mixture, "-o", there), "exists"),
        (("export", mixture, "-o", tmp_path / "out", "--dtype", "int3"), "int3"),
        (("export", mixture, "-o", tmp_path / "out", "--top-k", 9), "9"),
        (("export", mixture, "-o", taken, "--to", "gguf"), "exists"),
        (("export", mixture, "-o", tmp_path / "out", "--to", "gguf", "--quantize", "q9"), "q9"),
        (("export", mixture, "-o", f"{tmp_path}/new/", "--to", "gguf"), "ends in .gguf"),
        (("export", mixture, "-o", there, "--to", "compressed-tensors"), ""),
    ):
        code, out, err = octad(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert part in err
    assert {path.name for path in tmp_path.iterdir()} == {"there", "taken.gguf"}
    code, _, err = octad("quantize", mixture, "-o", tmp_path / "int8")
    assert (code, err.count("weights: about")) == (0, 1)


def test_a_directory_without_a_model_is_named_once(octad: Octad, tmp_path: Path) -> None:
    """And a demonstration begins with its heading once it can be."""
    for command in (("demo", "--base", tmp_path, "-o", tmp_path / "out"), ("inspect", f"{tmp_path}/")):
        code, out, err = octad(*command)
        assert (code, out, err.count(str(tmp_path))) == (2, "", 1), err
        assert "no config.json in it" in err
    code, out, err = octad("demo", "--base", "", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "--base: is empty" in err
    assert not list(tmp_path.iterdir())


def test_an_empty_path_is_none(octad: Octad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's variable that was not set is not the directory that the user is in; a dot is."""
    monkeypatch.chdir(tmp_path)
    for command in (("make", ""), ("combine", "recipe.yaml", "-o", ""), ("evaluate", "x", "--report=")):
        code, out, err = octad(*command)
        assert (code, out) == (2, ""), err
        assert "is empty; give a value" in err
    for options in (("--host", ""), ("--served-model-name", ""), ("--allowed-host=",)):  # "" is every address
        code, out, err = octad("serve", "x", *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert f"{options[0].rstrip('=')}: is empty" in err
    assert "holds no branch.yaml" in octad("make", ".")[2]
    assert not list(tmp_path.iterdir())


def test_what_has_no_effect_is_refused(octad: Octad, mixture: Path, tmp_path: Path) -> None:
    data = ("evaluate", mixture, "--data", tmp_path / "domains.yaml")
    for command, part in (
        ((*data, "--members"), "--members speaks of tasks"),
        ((*data, "--limit", 5), "--limit speaks of tasks"),
        ((*data, "--samples", 2), "--samples speaks of tasks"),
        ((*data, "--weak-sandbox"), "--weak-sandbox speaks of tasks"),
        (("evaluate", mixture, "--tasks", "octad-code", "--tokens", 64), "--tokens speaks of held-out text"),
        (("evaluate", mixture, "--tasks", "octad-code", "--seed", 0), "--seed speaks of held-out text"),
        (("quantize", mixture, "-o", tmp_path / "out", "--window", 64), "--window speaks of text"),
        (("init", tmp_path / "a", "--expert", "a=b", "--general", "c", "--no-general"), "exclude each other"),
        (("init", Path(__file__) / "a", "--expert", "a=b"), f"{__file__} is no directory"),
        (("evaluate", mixture, "--seed", -1), "--seed"),
        (("export", mixture, "--to", "gguf", "-o", Path(__file__) / "a.gguf"), f"{__file__} is no directory"),
    ):
        code, out, err = octad(*command)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert part in err
    assert not list(tmp_path.iterdir())
