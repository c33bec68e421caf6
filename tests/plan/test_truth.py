"""The planner beside what others published and what octad measured: how far off, and that the docs say the same figures.

A bound here is no promise that the planner is right: it holds the misses that docs/planning.md explains.
"""

import json
from pathlib import Path

import pytest
from bundled import SMOLLM2
from tiny_models import Octad

from octad.model.config import ModelConfig
from octad.plan.hardware import Cluster, Device, find_cluster, reached
from octad.plan.layouts import Layout
from octad.plan.memory import PRECISIONS, serving_memory
from octad.plan.shapes import readings
from octad.plan.step import decode_time, need, offloaded_time, step_time

DOCS = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")

# model, hardware, nodes, layout, window, tokens a step, published TFLOP/s a device
LLAMA, MIXTRAL = "llama-3.1-405b", "mixtral-8x7b"
TRAINED = {
    "Llama 3.1 405B on 8,192 H100": (
        LLAMA,
        1024,
        Layout(64, 1, 8, 16, "optimizer", 1, False),
        8192,
        16e6,
        430,
    ),
    "Llama 3.1 405B on 16,384 H100": (
        LLAMA,
        2048,
        Layout(128, 1, 8, 16, "optimizer", 1, False),
        8192,
        16e6,
        400,
    ),
    "Mixtral 8x7B on 64 H100": (MIXTRAL, 8, Layout(2, 8, 1, 4, "optimizer", 1, False), 4096, 256 * 4096, 468),
}
# precision, devices, tokens a second that gpt-fast's README has for Mixtral 8x7B on A100
DECODED = [
    ("bf16", 2, 78.75),
    ("bf16", 4, 118.23),
    ("bf16", 8, 203.69),
    ("int8", 1, 56.04),
    ("int8", 2, 99.91),
    ("int8", 4, 149.53),
    ("int8", 8, 218.48),
]


def row(name: str) -> str:
    return next(line for line in DOCS.splitlines() if line.startswith(f"| {name} |"))


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str) -> None:
    model, nodes, layout, window, batch, published = TRAINED[name]
    cluster = find_cluster("h100x8", nodes)
    assert layout.world == cluster.devices
    time = step_time(readings(model)[0].config, cluster, layout, window, batch)
    predicted = time.flops / time.total / cluster.devices / 1e12
    assert predicted == pytest.approx(published, rel=0.25)
    assert f"| {predicted:.0f} | {published} |" in row(name)


@pytest.mark.parametrize(("precision", "devices", "published"), DECODED)
def test_decoding(precision: str, devices: int, published: float) -> None:
    config, cluster = readings("8x7b")[0].config, find_cluster(f"a100x{devices}")
    predicted = 1 / decode_time(config, PRECISIONS[precision], cluster, 256, 1).total
    assert predicted == pytest.approx(published, rel=0.6 if devices == 8 else 0.3)
    assert f"| {predicted:.0f} | {published:.0f} |" in row(
        f"gpt-fast Mixtral 8x7B, {precision}, {devices} A100"
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_command_prints_the_rows(octad: Octad, devices: int) -> None:
    asked = ["plan", "8x7b", "--serve", "--hardware", f"a100x{devices}", "--context", "256"]
    options = json.loads(octad(*asked, "--json")[1])["readings"][0]["options"]
    shown = octad(*asked)[1].splitlines()
    for precision in (name for name, count, _ in DECODED if count == devices):
        (found,) = [o for o in options if o["precision"] == precision and o["place"] == "all on the device"]
        speed = found["tokens_per_second"]
        assert f"| {speed:.0f} |" in row(f"gpt-fast Mixtral 8x7B, {precision}, {devices} A100")
        (line,) = [x for x in shown if x.startswith(f"{precision} ") and "all on the device" in x]
        assert f"{speed:.3g}" in line.split()
        assert found["engine"] == "vLLM"  # octad's own int8 saves memory there, and no time


def test_decoding_with_experts_on_the_host() -> None:
    gpu = Cluster("own", Device.checked({"memory": 12, "bandwidth": 504, "tflops": 58}, "test"), 1)
    config = readings("qwen3-30b-a3b")[0].config
    seconds = offloaded_time(config, PRECISIONS["q4_0"], gpu, find_cluster("desktop"), 4096, 1).total
    assert 1 / seconds == pytest.approx(34.6, rel=0.5)
    assert f"| {1 / seconds:.0f} | 35 |" in row(
        "llama.cpp --cpu-moe, Qwen3-30B-A3B's shape, 12 GB GPU, DDR5-5600"
    )


def test_bfloat16_does_not_fit_one_a100() -> None:
    """Gpt-fast's table says "out of memory" there."""
    config, cluster = readings("8x7b")[0].config, find_cluster("a100x1")
    assert serving_memory(config, PRECISIONS["bf16"], 256, 1).total > cluster.device.bytes * reached("usable")
    assert serving_memory(config, PRECISIONS["int8"], 256, 1).total < cluster.device.bytes * reached("usable")


def arithmetic_hours(active: float, tokens: float, cluster: Cluster, share: str) -> float:
    """Device hours of a run of a model that is known by its active parameters alone: 6 FLOPs a parameter and token at the
    assumed share of peak, no attention scores, nothing exchanged."""
    return 6 * active * tokens / (need(cluster, "tflops") * reached(share)) / 3600


def test_whole_runs_by_their_arithmetic() -> None:
    deepseek = arithmetic_hours(37e9, 14.8e12, find_cluster("h800x8"), "training_moe_narrow") / 1e6
    assert f"| {deepseek:.2f} M hours | 2.788 M hours |" in row("DeepSeek-V3 on H800")
    glam = arithmetic_hours(96.6e9, 600e9, find_cluster("tpu-v4"), "training_moe") * 0.326 / 1000
    assert f"| {glam:.0f} MWh | 456 MWh |" in row("GLaM 64B/64E on TPU v4")
    assert deepseek == pytest.approx(2.788, rel=0.25)
    assert 0.4 < glam / 456 < 1


BASE = ModelConfig.from_dict({"model_type": "llama"} | SMOLLM2)

# octad's own figures, one user: engine_fast_memory.json, memory that reads at 82.7 GB/s; engine_avx2.json, at 36.7
OWN = [
    ("int8", 82.7, 250),
    ("int4", 82.7, 346),
    ("bf16", 82.7, 136),
    ("int8", 36.71, 112),
    ("int4", 36.71, 161),
    ("bf16", 36.71, 61),
]


# the 135M base, everything learns, windows of 512, 2,048 tokens a step; peak GFLOP/s of one product measured beside it
TRAINED_HERE = [("bfloat16, AVX-512, two cores", 856.3, 649), ("float32, AVX2, one core", 91.4, 84.7)]


@pytest.mark.parametrize(("how", "peak", "measured"), TRAINED_HERE)
def test_a_training_step_of_the_base(how: str, peak: float, measured: float) -> None:
    device = {"memory": 24, "bandwidth": 30, "unified": True, "tflops": peak / 1000}
    machine = Cluster("desktop-like", Device.checked(device, "test"), 1)
    time = step_time(BASE, machine, Layout(shard="nothing", micro=4, recompute=False), 512, 2048)
    predicted = 2048 / time.total
    assert predicted == pytest.approx(measured, rel=0.25)
    assert f"| {predicted:.0f} | {measured:.0f} |" in row(f"a training step of the 135 M base, {how}")


@pytest.mark.parametrize(("precision", "bandwidth", "measured"), OWN)
def test_the_demos_mixture_decoding(precision: str, bandwidth: float, measured: float) -> None:
    config = ModelConfig.from_dict({"model_type": "mixtral"} | SMOLLM2)
    machine = Cluster(
        "desktop-like", Device.checked({"memory": 24, "bandwidth": bandwidth, "unified": True}, "test"), 1
    )
    predicted = 1 / decode_time(config, PRECISIONS[precision], machine, 128, 1).total
    assert predicted == pytest.approx(measured, rel=0.25)
    assert f"| {predicted:.0f} | {measured} |" in row(
        f"the demo's mixture, {precision}, {bandwidth:.1f} GB/s"
    )
