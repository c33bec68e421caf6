"""The planner's answers for people: a few tables that fit 80 columns, and what they rest on.

for part in render(train_answer(...)): terminal.out.print(part)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from octad.figures import human, percent
from octad.report.table import Table
from octad.report.terminal import table

Answer = dict[str, Any]


def render(answer: Answer) -> Iterator[RenderableType]:
    """Everything there is to say, in order."""
    yield Text(_hardware(answer["hardware"]), style="bold")
    for reading in answer["readings"]:
        yield Text()
        yield Text(_size(reading), style="bold")
        if reading["note"]:
            yield Text(reading["note"], style="dim")
        yield from _training(reading, answer) if answer["question"] == "train" else _serving(reading, answer)
    yield Text()
    yield from _grounds(answer)


def _hardware(facts: Answer) -> str:
    many = f"{facts['devices']:,} x " if facts["devices"] > 1 else ""
    nodes = f" in {facts['nodes']:,} nodes" if facts["nodes"] > 1 else ""
    return f"{many}{facts['title'] or facts['name']}{nodes}"


def _size(reading: Answer) -> str:
    return (
        f"{reading['label']}: {human(reading['parameters'])} parameters, "
        f"{human(reading['active'])} active a token"
    )


# ---- training ---------------------------------------------------------------------------------------------------


def _training(reading: Answer, answer: Answer) -> Iterator[RenderableType]:
    yield Text(
        f"{human(answer['tokens'])} tokens take {reading['flops']:.3g} FLOPs; steps of "
        f"{human(answer['batch'])} tokens in windows of {answer['window']:,}"
        + (
            f"; {reading['copies']} copies on {reading['devices_a_copy']:,} devices each"
            if reading["copies"] > 1
            else ""
        )
    )
    if not reading["plans"]:
        nearest = reading["nearest"]
        yield Text(
            f"Nothing fits, of {reading['tried']:,} layouts: the nearest, {nearest['layout']}, takes "
            f"{_gb(nearest['memory']['total'])} a device and lacks {_gb(nearest['lacks'])}. "
            "Take more nodes or larger devices."
        )
        return
    yield table(_plans(reading))
    if all(plan["trainer"] != "octad" for plan in reading["plans"]):
        yield Text("None that octad trains itself (tensor and pipeline 1) fits.")
    best = reading["plans"][0]
    yield Text(_bill(best))
    yield table(
        _parts(f"Memory of a device, at the {best['memory']['moment']}", best["memory"]["parts"], _gb)
    )
    yield table(_parts("A step", best["step"]["parts"], _seconds))


def _plans(reading: Answer) -> Table:
    rows = []
    for plan in reading["plans"]:
        grid = plan["layout"]
        shape = " ".join(str(grid[name]) for name in ("data", "expert", "tensor", "pipeline"))
        rows.append(
            [
                shape,
                _gb(plan["memory"]["total"]),
                percent(plan["mfu"]),
                _days(plan["days"]),
                plan["trainer"],
                _how(plan),
            ]
        )
    room = _gb(reading["capacity"])
    caption = f"Layouts (data expert tensor pipeline), quickest of {reading['tried']:,}; {room} usable"
    return Table.of(caption, ["layout", ">memory", ">MFU", ">time", "trainer", "why"], rows)


def _how(plan: Answer) -> str:
    shards = {"weights": "FSDP", "optimizer": "ZeRO-1", "nothing": "whole"}
    return f"{plan['why']} ({shards[plan['layout']['shard']]}, {plan['layout']['micro']} at a time)"


def _bill(plan: Answer) -> str:
    """Time, money and energy of the best plan."""
    parts = [f"Quickest: {_days(plan['days'])}, {human(plan['device_hours'])} device hours"]
    if plan["dollars"]:
        low, high = plan["dollars"]
        parts.append(f"{_dollars(low)} to {_dollars(high)}" if high > low else _dollars(low))
    else:
        parts.append("price unknown")
    parts.append("energy unknown" if plan["kwh"] is None else human(plan["kwh"] * 1000, "Wh"))
    return ", ".join(parts) + "."


def _parts(caption: str, parts: dict[str, float], say: Any) -> Table:
    total = sum(parts.values())
    rows = [[name, say(value), percent(value / total)] for name, value in parts.items() if value]
    return Table.of(caption, ["part", ">size" if say is _gb else ">time", ">share"], rows)


# ---- serving ----------------------------------------------------------------------------------------------------


def _serving(reading: Answer, answer: Answer) -> Iterator[RenderableType]:
    users = "one user" if answer["users"] == 1 else f"{answer['users']:,} users"
    first = reading["prefill_seconds"]
    yield Text(
        f"{users}, {answer['context']:,} tokens of context: {_gb(reading['kv_bytes'])} of keys and values"
        + (
            f"; a full prompt is read in {_seconds(first)}"
            if first is not None
            else "; reading speed unknown"
        )
    )
    rows = [_option(option) for option in reading["options"]]
    titles = ["precision", "where", ">memory", "fits", ">tokens/s", "engine"]
    yield table(Table.of("", titles, rows))
    shown = next((o for o in reading["options"] if o["fits"]), reading["options"][0])
    caption = f"Memory: {shown['precision']}, {shown['place']}; {_gb(shown['capacity'])} usable"
    yield table(_parts(caption, shown["memory"]["parts"], _gb))


def _option(option: Answer) -> list[str]:
    lacking = option["memory"]["total"] - option["capacity"]
    memory = _gb(option["memory"]["total"])
    if option.get("host_bytes"):
        memory += f" + {_gb(option['host_bytes'])}"
    speed = human(option["tokens_per_second"])
    fits = "yes" if option["fits"] else f"lacks {_gb(lacking)}"
    return [option["precision"], option["place"], memory, fits, speed, option["engine"]]


# ---- what it rests on -------------------------------------------------------------------------------------------


def _grounds(answer: Answer) -> Iterator[RenderableType]:
    """Assumed efficiencies, and figures that nobody saw in a source."""
    assumed = ", ".join(f"{name} {found['value']:g}" for name, found in answer["assumptions"].items())
    yield Text(f"Assumed: {assumed} (why: --json, docs/planning.md).", style="dim")
    for facts in (answer["hardware"], answer.get("host")):
        if facts and facts["unchecked"]:
            yield Text(
                f"Not checked in a source, of {facts['name']}: {', '.join(facts['unchecked'])}.", style="dim"
            )
    yield Text(
        "Times are predictions: docs/planning.md shows them beside what was published and measured.",
        style="dim",
    )


def _gb(size: float) -> str:
    return human(size, "B")


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1000:.3g} ms"


def _days(days: float) -> str:
    return f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days" if days >= 1 else f"{days * 24:.1f} h"


def _dollars(amount: float) -> str:
    return f"${human(amount)}".replace(" ", "") if amount >= 1 else f"${amount:.2f}"
