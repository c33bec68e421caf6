"""Verdicts on comparisons whose figures are set by hand: good mixtures, bad ones, and those of which nothing is known."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from octad.errors import OutputError
from octad.evaluate.advice import advise
from octad.evaluate.card import may_write, with_verdict, write_verdict
from octad.evaluate.compare import Comparison, Row, Settings, _with_ensemble, _with_oracle, differences
from octad.evaluate.heldout import Texts
from octad.evaluate.lineup import LineUp
from octad.evaluate.price import Price
from octad.evaluate.record import make_report
from octad.evaluate.verdict import make_verdict
from octad.guard import jsonable
from octad.report import verdict_blocks as views
from octad.report.table import MOST_EXPERTS, Table
from octad.report.terminal import table
from octad.text.windows import Window

DOMAINS = ["python", "french", "maths"]
DOCUMENTS, TOKENS = 30, 40
Rates = Mapping[str, Mapping[str, float]]

# nats a token: each member is best on its own domain by a lot
MEMBERS = {m: {d: 2.0 if m == d else 2.6 for d in DOMAINS} for m in DOMAINS}
SOUP = {"soup": dict.fromkeys(DOMAINS, 2.3)}


def comparison(
    rates: Rates,
    shares: Any = None,
    *,
    quirk: float = 0.02,
    missing: tuple[str, ...] = (),
    documents: Mapping[str, int] | None = None,
) -> Comparison:
    """Contestants with these rates; documents differ, and contestants a little from document to document."""
    random = np.random.default_rng(0)
    texts = Texts(
        {
            d: [
                Window(tuple(range(TOKENS + 1)), 4 * TOKENS, n % (documents or {}).get(d, DOCUMENTS))
                for n in range(DOCUMENTS)
            ]
            for d in DOMAINS
        }
    )
    common = random.normal(0, 0.3, (len(DOMAINS), DOCUMENTS))
    rows: dict[str, Row] = {}
    for name, row in rates.items():
        own = np.array([[row[d]] for d in DOMAINS]) + common + quirk * random.normal(size=common.shape)
        kind = "member" if name in DOMAINS else name.split()[0]
        flops = 1e9 * (int(name.rpartition("-")[2]) if kind == "mixture" else 1)
        price = Price(int(1e9), int(flops / 4), flops, int(2e9), 500.0, int(3e9))
        rows[name] = Row(name, kind, None, np.repeat(own.ravel(), TOKENS).astype(np.float32), price)
    own_name = next((name for name in rates if name.startswith("mixture")), "model")
    rows, chosen = _with_oracle(_with_ensemble(rows, texts), texts)
    load = None if shares is None else torch.tensor(shares)[None] * 1000
    lineup = LineUp({}, own_name, DOMAINS if len(chosen) else [], missing=list(missing))
    found = Comparison(
        "m", own_name, texts, Settings(resamples=300), lineup, rows, "float32", chosen=chosen, load=load
    )
    found.differences = differences(found)
    return found


def mixture(two: Mapping[str, float], one: Mapping[str, float] | None = None) -> Rates:
    table = {**MEMBERS, **SOUP, "mixture top-2": dict(two)}
    return table if one is None else {**table, "mixture top-1": dict(one)}


def flat(value: float) -> dict[str, float]:
    return dict.fromkeys(DOMAINS, value)


RIGHT = [[0.48, 0.26, 0.26], [0.26, 0.48, 0.26], [0.26, 0.26, 0.48]]  # of the choices at top-2
EVEN = [[0.34, 0.33, 0.33]] * 3
WRONG = [[0.26, 0.48, 0.26], [0.26, 0.26, 0.48], [0.48, 0.26, 0.26]]


def answers(found: Comparison) -> dict[str, str]:
    return {q["question"]: q["answer"] for q in make_verdict(found)["questions"]}


def test_a_mixture_that_beats_everything() -> None:
    found = comparison(mixture(flat(1.9)), RIGHT)
    verdict = make_verdict(found)
    assert set(answers(found).values()) == {"yes"}
    best = found.difference("mixture top-2", found.best_member()).relative
    oracle = found.difference("mixture top-2", "oracle").relative
    assert verdict["headline"] == (
        f"{-100 * best:.0f} % better than the best of its parts;"
        f" {-100 * oracle:.1f} % better than always knowing the right specialist."
    )
    assert verdict["worse_on"] == []
    assert verdict["advice"] == []
    assert any("On none of 3 domains" in s for s in verdict["sentences"])
    assert [s.split(":")[0].partition(" below ")[2] for s in verdict["details"]] == [
        f"the best single member, {found.best_member()}",
        "the soup",
        "the ensemble",
        "the oracle",
    ]


def test_a_mixture_a_little_behind_its_specialists() -> None:
    found = comparison(mixture({"python": 2.0, "french": 2.05, "maths": 2.0}), RIGHT)
    verdict = make_verdict(found)
    assert answers(found)["better than every member?"] == "yes"
    assert answers(found)["better than the soup?"] == "yes"
    assert answers(found)["better than the oracle?"] == "no"
    assert "worse than always knowing the right specialist" in verdict["headline"]
    first = verdict["worse_on"][0]
    assert (first["domain"], first["against"]) == ("french", "french")
    assert first["difference"] == pytest.approx(0.05 / 4 / np.log(2), rel=0.5)
    assert 0 < first["low"] < first["difference"] < first["high"]
    (advice,) = verdict["advice"]
    assert "french" in advice
    assert "octad train" in advice  # the router sends french to its specialist: it is not to blame


def test_a_random_router() -> None:
    """Between the members, near the soup, experts chosen evenly."""
    found = comparison(mixture(flat(2.31)), EVEN)
    verdict = make_verdict(found)
    assert answers(found)["better than the soup?"] in ("no", "unclear")
    assert answers(found)["better than the oracle?"] == "no"
    assert "the router does not know the domains" in verdict["advice"][0]
    assert any("not for certain better than averaging" in line for line in verdict["advice"])
    assert any("better for certain on 3 of 3 domains" in s for s in verdict["sentences"])
    assert "averaging their weights" in verdict["headline"]


def test_a_router_that_has_no_choice() -> None:
    """Where all experts read every token, even shares say nothing of it."""
    lines = advise(comparison({**MEMBERS, **SOUP, "mixture top-3": flat(2.31)}, [[1 / 3] * 3] * 3))
    assert any("not for certain better than averaging" in line for line in lines)
    assert not any("does not know" in line for line in lines)


def test_shuffled_experts() -> None:
    found = comparison(mixture(flat(2.6)), WRONG)
    advice = make_verdict(found)["advice"]
    assert "do not belong together: 3 of 3 domains" in advice[0]
    assert "python to french, best is python" in advice[0]
    assert answers(found)["better than every member?"] == "no"


def test_a_domain_that_the_router_misses() -> None:
    shares = [RIGHT[0], [0.48, 0.20, 0.32], RIGHT[2]]
    advice = advise(comparison(mixture({"python": 1.99, "french": 2.4, "maths": 1.99}), shares))
    assert any(
        "gives french 20 % of its choices, of at most 50 %: retrain the router on french" in a for a in advice
    )


def test_fewer_experts_a_token() -> None:
    better = advise(comparison(mixture(flat(2.0), flat(1.95)), RIGHT))
    assert any("mixture top-1 is better for certain" in a and "0.50 times the FLOPs" in a for a in better)
    same = advise(comparison(mixture(flat(1.9), flat(1.9)), RIGHT, quirk=0.001))
    assert any("mixture top-1 is as good within 0.2 %" in a for a in same)
    assert not any("top-1" in a for a in advise(comparison(mixture(flat(1.9), flat(1.95)), RIGHT)))


def test_dead_and_useless_experts() -> None:
    shares = [[0.5, 0.48, 0.02], [0.48, 0.5, 0.02], [0.5, 0.45, 0.05]]
    advice = advise(comparison(mixture(flat(1.9)), shares))
    assert advice == ["drop expert maths: no domain gives it more than 5.0 % of its choices"]
    worse = {**MEMBERS, "maths": flat(2.7)} | SOUP | {"mixture top-2": flat(1.9)}
    (line,) = (
        a for a in advise(comparison(worse, RIGHT)) if "expert maths is the best member of no domain" in a
    )
    assert ": on maths, " in line  # it was judged on text of its own


def test_what_more_text_would_tell() -> None:
    found = comparison(mixture(flat(2.0)), RIGHT, quirk=0.3)
    interval = found.difference("mixture top-2", "oracle").interval
    assert interval.answer == "unclear"
    lines = [a for a in advise(found) if "more held-out text" in a]
    assert len(lines) <= 1


def test_dense_models_and_mixtures_of_which_nothing_is_known() -> None:
    found = comparison({"model": flat(2.0)}, missing=("it is a dense model",))
    verdict = make_verdict(found)
    assert "nothing to compare it with" in verdict["headline"]
    assert (verdict["questions"], verdict["worse_on"], verdict["advice"]) == ([], [], [])
    assert any("It is a dense model." in s for s in verdict["sentences"])
    found = comparison({"mixture top-2": flat(2.0), "mixture top-1": flat(2.2)}, missing=("who knows",))
    verdict = make_verdict(found)
    assert (verdict["questions"], verdict["worse_on"]) == ([], [])
    assert any("Who knows." in s for s in verdict["sentences"])
    found = comparison({"model": flat(2.0), "dense x": flat(2.2)})
    assert answers(found) == {"better than dense x?": "yes"}


def test_the_report_is_plain() -> None:
    found = comparison(mixture(flat(2.0), flat(2.1)), RIGHT)
    report = make_report(found, [], routing=None, command="octad evaluate m")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"octad", "made", "model", "settings", "machine", "domains", "contestants"} <= report.keys()
    assert {"differences", "routing", "tasks", "verdict", "requirements"} <= report.keys()
    assert report["domains"][0] | {"units": "documents"} == {
        "name": "python",
        "documents": DOCUMENTS,
        "windows": DOCUMENTS,
        "tokens": DOCUMENTS * TOKENS,
        "bytes": 4 * DOCUMENTS * TOKENS,
        "units": "documents",
    }
    rows = {c["name"]: c for c in report["contestants"]}
    assert list(rows) == [*DOMAINS, "soup", "ensemble", "oracle", "mixture top-2", "mixture top-1"]
    assert rows["oracle"]["bits_per_byte"] == {d: rows[d]["bits_per_byte"][d] for d in DOMAINS}
    assert rows["ensemble"]["price"]["flops_per_token"] == 3e9
    assert rows["ensemble"]["price"]["tokens_per_second"] == pytest.approx(500 / 3)
    pairs = {(d["of"], d["against"], d["domain"]) for d in report["differences"]}
    assert len(pairs) == len(report["differences"]) == 2 * 7 * 4
    assert jsonable({"a": (float("inf"), 1)}) == {"a": [None, 1]}


def test_what_is_too_small_to_matter_is_neither_better_nor_worse() -> None:
    """One document is like the next here, so the interval is narrow whatever it says."""
    tiny = comparison(mixture(dict.fromkeys(DOMAINS, 2.0 * 0.9999)), RIGHT, quirk=1e-6)
    verdict = make_verdict(tiny)
    interval = tiny.difference("mixture top-2", "oracle").interval
    assert interval.high < 0  # certain, and 0.01 %
    assert answers(tiny)["better than the oracle?"] == "same"
    assert "about as good as always knowing the right specialist" in verdict["headline"]
    assert verdict["worse_on"] == []
    worse = comparison(mixture(dict.fromkeys(DOMAINS, 2.0 * 1.001)), RIGHT, quirk=1e-6)
    assert worse.difference("mixture top-2", "oracle").interval.low > 0
    assert make_verdict(worse)["worse_on"] == []
    strict = replace(worse, settings=Settings(resamples=300, smallest=0.0001))
    strict.differences = differences(strict)
    assert answers(strict)["better than the oracle?"] == "no"
    assert sorted(w["domain"] for w in make_verdict(strict)["worse_on"]) == sorted(DOMAINS)
    assert [d["answer"] for d in make_report(strict)["differences"] if d["against"] == "oracle"] == ["no"] * 4


def test_what_may_be_chance_is_not_listed_as_a_loss() -> None:
    found = comparison(mixture({"python": 2.0, "french": 2.05, "maths": 2.004}), RIGHT, quirk=0.03)
    difference = found.difference("mixture top-2", "oracle", "maths")
    assert difference.answer == "unclear"
    assert [w["domain"] for w in make_verdict(found)["worse_on"]] == ["french"]


def test_too_few_documents_are_said_in_the_headline() -> None:
    few = comparison(mixture(flat(1.9)), RIGHT, documents={"french": 4})
    assert "(not for certain: fewer than five documents in french)" in make_verdict(few)["headline"]
    none = comparison(mixture(flat(1.9)), RIGHT, documents=dict.fromkeys(DOMAINS, 3))
    assert "fewer than five documents in each domain" in make_verdict(none)["headline"]


def test_what_the_mixture_lacks_of_its_members_is_repeated() -> None:
    found = comparison(mixture(flat(1.9)), RIGHT)
    found.lineup.lost = {"french": "attention 0.031 from the base", "maths": "norms 0.12 from the base"}
    verdict = make_verdict(found)
    assert (
        "Not in the mixture as its members had it: french (attention 0.031 from the base);"
        " maths (norms 0.12 from the base)."
    ) in verdict["sentences"]
    assert "lacks a part of french and maths" in verdict["advice"][0]


# ---- at a terminal ---------------------------------------------------------------------------------------------


def shown(report: Mapping[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in views.render(report):
        console.print(part)
    return console.export_text()


def test_eighty_columns_are_enough() -> None:
    found = comparison(mixture({"python": 2.0, "french": 2.05, "maths": 2.0}, flat(2.2)), RIGHT)
    text = shown(make_report(found), 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert " ".join(text.split()).startswith(make_verdict(found)["headline"])
    for name in found.rows:
        (row,) = [line for line in lines if line.startswith(name) and f"{found.mean(name):.4f}" in line]
        assert name == found.own or ("better" in row or "worse" in row)
    assert f"{found.mean('mixture top-2'):.4f}" in text
    assert "oracle: the best part for each kind of text" in text
    assert "50 % is the most that one can have" in " ".join(text.split())


def test_the_load_of_more_experts_than_a_terminal_has_room_for() -> None:
    experts = [f"[red]e{e}" for e in range(40)]
    shares = {"one": [1 / 40] * 40, "two": [0.0] * 39 + [1.0]}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(views.load({"load": shares, "experts": experts}) or Table("", [], [])))
    header, one, two = console.export_text().splitlines()[1:]
    assert header.split() == ["text", *experts[: MOST_EXPERTS - 1], experts[39], "24", "others"]
    assert one.replace("%", "").split() == ["one", *["2"] * MOST_EXPERTS, "60"]
    assert two.split()[-4:] == ["100", "%", "0", "%"]


# ---- the model card --------------------------------------------------------------------------------------------


def source(directory: Path | None) -> Any:
    return SimpleNamespace(directory=directory, label="m")


def test_the_card_holds_one_verdict(tmp_path: Path) -> None:
    report = make_report(comparison(mixture(flat(1.9)), RIGHT))
    card = "---\nlibrary_name: transformers\n---\n# A mixture\n\nText.\n"
    once = with_verdict(card, report)
    assert once.startswith(card)
    assert report["verdict"]["headline"] in once
    assert "| mixture top-2 |" in once
    twice = with_verdict(once + "\nWritten by hand below.\n", report)
    assert twice.count("## Verdict") == 1
    assert twice.startswith(card)
    assert twice.rstrip().endswith("Written by hand below.")
    (tmp_path / "README.md").write_text(card)
    write_verdict(source(tmp_path), report)
    write_verdict(source(tmp_path), report)
    assert (tmp_path / "README.md").read_text() == once
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_whose_card_is_written_unasked(tmp_path: Path) -> None:
    report = make_report(comparison(mixture(flat(1.9)), RIGHT))
    tokens = 3 * DOCUMENTS * TOKENS
    assert not may_write(source(None), tokens)
    assert not may_write(source(tmp_path), tokens)  # octad did not make it
    (tmp_path / "octad.json").write_text("{}")
    assert may_write(source(tmp_path), tokens)
    write_verdict(source(tmp_path), report)
    assert may_write(source(tmp_path), tokens)
    assert not may_write(source(tmp_path), tokens - 1)  # there is a verdict on more text
    with pytest.raises(OutputError, match="--card"):
        write_verdict(source(None), report)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    assert not may_write(source(tmp_path), tokens)
    with pytest.raises(OutputError, match="UTF-8"):
        write_verdict(source(tmp_path), report)
    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe"
