"""The search over layouts: only what can work, ranked by time, each with a reason; and the command around it."""

import json
import subprocess
import sys

import pytest
from tiny_models import Octad

from octad.errors import OctadError
from octad.plan.hardware import Cluster, Device, find_cluster
from octad.plan.reply import serve_answer, train_answer
from octad.plan.search import layouts, training_plans
from octad.plan.shapes import readings

MIXTRAL = readings("8x7b")[0].config


def test_layouts_divide_what_there_is() -> None:
    cluster = find_cluster("h100x8", nodes=4)
    found = list(layouts(MIXTRAL, cluster, 4096, 4e6))
    assert len(found) == len(set(found)) > 50
    for layout in found:
        assert layout.world == 32
        assert 8 % layout.expert == 0
        assert layout.tensor <= 8
        assert 8 % layout.tensor == 0  # key/value heads
        assert layout.pipeline <= 32
        assert layout.replicas * layout.micro * 4096 <= 4e6


def test_dense_models_have_no_expert_ranks() -> None:
    dense = readings("llama-3.1-8b")[0].config
    assert {layout.expert for layout in layouts(dense, find_cluster("h100x8"), 4096, 1e6)} == {1}


def test_plans_fit_and_are_ranked() -> None:
    found = training_plans(MIXTRAL, find_cluster("h100x8", nodes=8), 4096, 1e6)
    paces = [plan.pace for plan in found.plans[:8]]
    assert paces == sorted(paces)
    assert [plan.mfu for plan in found.plans[:8]] == sorted((p.mfu for p in found.plans[:8]), reverse=True)
    assert all(plan.memory.total <= found.capacity for plan in found.plans)
    assert all(0 < plan.mfu < 0.5 for plan in found.plans)
    assert found.plans[0].why.startswith("quickest")
    assert all(plan.why for plan in found.plans)
    assert found.best_of("octad") is not None


def test_nothing_fits_says_how_much_is_lacking() -> None:
    found = training_plans(readings("8x70b")[0].config, find_cluster("rtx4090", nodes=2), 4096, 1e6)
    assert found.plans == ()
    assert found.nearest is not None
    assert found.nearest[1].total > found.capacity


def test_more_devices_are_quicker() -> None:
    seconds = [
        training_plans(MIXTRAL, find_cluster("h100x8", nodes=n), 4096, 4e6).plans[0].time.total
        for n in (4, 8, 16)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(OctadError, match="larger --batch"):
        training_plans(readings("olmoe-1b-7b")[0].config, find_cluster("h100x8", nodes=4099), 4096, 4096)


def test_unknown_figures_are_asked_for() -> None:
    silent = Cluster("silent", Device.checked({"memory": 80, "bandwidth": 3000, "tflops": 900}, "test"), 4)
    with pytest.raises(OctadError, match="link"):
        training_plans(readings("olmoe-1b-7b")[0].config, silent, 512, 1e5)
    with pytest.raises(OctadError, match="tflops"):
        training_plans(readings("olmoe-1b-7b")[0].config, find_cluster("m3-ultra"), 512, 1e5)


def test_money_and_energy_by_hand() -> None:
    answer = train_answer(
        readings("8x7b"), find_cluster("h100x8", nodes=8), tokens=1e12, window=4096, batch=1e6
    )
    best = answer["readings"][0]["plans"][0]
    hours = best["days"] * 24 * 64
    assert best["device_hours"] == pytest.approx(hours)
    assert best["dollars"] == pytest.approx([1.99 * hours, 5.0 * hours])
    assert best["kwh"] == pytest.approx(hours * 0.7 * 1.5)
    per_device = answer["readings"][0]["flops"] / (hours * 3600) / 989.4e12
    assert best["mfu"] == pytest.approx(per_device, rel=1e-6)


def test_copies_share_tokens_and_nodes() -> None:
    """Eight models side by side at top-2: each sees a quarter of the tokens on an eighth of the nodes."""
    answer = train_answer(
        readings("8x220b"), find_cluster("h100x8", nodes=1024), tokens=13e12, window=4096, batch=16e6
    )
    apart, shared = answer["readings"]
    assert apart["devices_a_copy"] == 1024
    assert apart["flops"] / shared["flops"] == pytest.approx(440 / 400.8, rel=0.02)
    best = apart["plans"][0]
    seen = best["days"] * 86400 * best["tokens_per_second"]
    assert seen == pytest.approx(13e12, rel=1e-6)


def test_experts_go_to_the_host_where_they_do_not_fit() -> None:
    answer = serve_answer(readings("8x7b"), find_cluster("rtx4090"), context=4096, users=1)
    options = answer["readings"][0]["options"]
    fitting = [o for o in options if o["fits"]]
    assert {o["place"] for o in fitting} == {"experts on the host"}
    assert options[0]["tokens_per_second"] == max(o["tokens_per_second"] for o in fitting)
    assert all(o["tokens_per_second"] is None for o in options if not o["fits"])


def test_the_command_in_json(octad: Octad) -> None:
    code, out, err = octad("plan", "8x7b", "--hardware", "h100x8", "--nodes", "8", "--tokens", "1T", "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["readings"][0]["parameters"] == 46_702_792_704
    assert answer["tokens"] == 1e12


@pytest.mark.parametrize("serve", [[], ["--serve"]])
def test_the_command_for_people(octad: Octad, serve: list[str]) -> None:
    code, out, err = octad("plan", "8x220b", "--nodes", "64", *(serve or ["--tokens", "13T"]))
    assert (code, err) == (0, "")
    assert "1.76 T parameters, 440 B active" in out
    assert "attention shared" in out
    assert "assumed" in out
    assert serve or "None that octad trains itself" in out
    assert max(map(len, out.splitlines())) <= 140


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "many"], "--tokens: found 'many'"),
        (["--batch", "0"], "--batch: found '0'"),
        (["--serve", "--precision", "int3"], "--precision: found 'int3'"),
        (["--hardware", "h10x8"], "did you mean 'h100'?"),
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "10" * 13], "1000000"),
        (["--tokens", "10001T"], "10000T at most"),
        (["--tokens", "0.5"], "--tokens: found '0.5'"),
        (["--batch", "11B"], "10B at most"),
        (["--window", "100000001"], "100000000"),
        (["--serve", "--context", "1" + "0" * 25], "100000000"),
        (["--serve", "--users", "1000001"], "1000000"),
        (["--hardware", "h100x4097"], "1 to 4096 devices"),
        (["--hardware", "h100x00004097"], "1 to 4096 devices"),
        (["--experts", "4097"], "4096"),
        (["--context", "8192"], "--context: has no effect without --serve"),
        (["--serve", "--batch", "1M"], "--batch: has no effect with --serve"),
    ],
)
def test_mistakes_are_one_line(octad: Octad, arguments: list[str], words: str) -> None:
    code, out, err = octad("plan", "8x7b", *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from octad.cli.main import app; app(['plan', '8x7b', '--json'], standalone_mode=False); "
    )
    code += "print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "False"
