"""The results of a benchmark as a person reads them: a heading; tables of reading, writing, many users and memory; notes.

    for part in render(results):
        console.print(part)

Speeds are medians; the dim figures behind them are the lowest and highest of all repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from octad.bench.measures import nearest, ratio, speed
from octad.figures import duration, human, percent
from octad.report.table import Cell, Table
from octad.report.terminal import life, table

Contestant = Mapping[str, Any]
NOTHING = "-"
SOON = 0.03  # of the work, from which on what is left can be told


def render(results: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The parts, top to bottom."""
    yield heading(results)
    yield _title("reading a prompt", "tokens/s: median (lowest-highest), share of the arithmetic limit (MFU)")
    yield table(one_user(results, "prefill"))
    yield _title("writing, one user", "tokens/s, share of the bandwidth at that moment (MBU), time per token")
    yield table(one_user(results, "decode"))
    yield _title("many users", "tokens/s of all together (times one user's), wait for the first token")
    yield table(many_users(results))
    yield _title("memory", "weights as they lie in memory; the whole process once loaded, and at most")
    yield table(memory(results))
    if (rows := expert_store(results)) is not None:
        yield _title(
            "experts on the disk", "what was in memory, beside routers that choose by chance; a token's cost"
        )
        yield table(rows)
    if price := price_line(results):
        yield price
    for line in results["summary"].get("slower_with_fewer_bits", ()):
        yield Text(f"\n  warning: {line}", style="yellow")
    yield ""
    for reason, names in failures(results).items():
        yield Text(f"  not measured: {', '.join(names)}: {reason}")
    for note in results["notes"]:
        yield Text(f"  {note}", style="dim")


def failures(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Why contestants or some of their cells could not be measured; contestants with the same reason together."""
    found: dict[str, list[str]] = {}
    for contestant in results["contestants"]:
        cells = [c["tokens_per_s"].get("reason") for c in contestant["cells"]]
        for reason in dict.fromkeys(filter(None, [contestant["failed"], *cells])):
            found.setdefault(reason, []).append(contestant["name"])
    return found


@contextmanager
def live(console: Console) -> Iterator[Callable[[str, float], None]]:
    """One moving line that says what is running; without a terminal, a line for each thing that is measured."""
    columns = (
        BarColumn(24),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)
    task, stages, begun = bar.add_task("", total=1.0), set[str](), time.monotonic()

    def left(done: float) -> str:
        """How far it is and how long it still takes, once that can be told."""
        seconds = (time.monotonic() - begun) * (1 - done) / max(done, 1e-9)
        return f" ({percent(done)} done, about {duration(seconds)} left)" if done > SOON else ""

    now = ("", 0.0)

    def tell(what: str, done: float) -> None:
        """What is measured now, and the share of the work that is done."""
        nonlocal now
        now = what, done
        if console.is_terminal:
            bar.start()
            bar.update(task, description=what, completed=done)
        elif (stage := what.split(":")[0]) not in stages:
            stages.add(stage)
            console.print(stage + left(done), markup=False)

    try:
        with life.doing(lambda: f"{now[0]}{left(now[1])}", shown=console.is_terminal):
            yield tell
    finally:
        if console.is_terminal:
            bar.stop()


def heading(results: Mapping[str, Any]) -> str:
    """The model and the machine, with its limits."""
    model, machine, limits = results["model"], results["hardware"], results["limits"]
    kind = f"{model['experts']} experts, top-{model['experts_per_token']}" if model["experts"] else "dense"
    peaks = ", ".join(
        f"{name} {human(found['best'], 'FLOP/s')}" for name, found in limits["matmul_flops_per_s"].items()
    )
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    isa = f", {machine['kernels']} kernels" if machine.get("kernels") else ""
    return (
        f"[bold]{model['name']}[/]: {model['model_type']}, {kind}, {human(model['parameters'])} parameters,"
        f" {human(model['active_parameters'])} active\n"
        f"{machine.get('gpu') or machine['cpu']}, {threads}{isa};"
        f" reads {human(limits['read_bytes_per_s']['best'], 'B/s')}, multiplies {peaks}"
    )


def one_user(results: Mapping[str, Any], measure: str) -> Table:
    """One row a contestant: tokens/s at each length with the share of the limit, and how many times the peers' it is."""
    cells = [c for c in results["contestants"][0]["cells"] if c["users"] == 1 and c["measure"] == measure]
    lengths = [f">{c['length']} tokens" if measure == "prefill" else f">behind {c['length']}" for c in cells]
    beside = max(cells, key=lambda c: c["length"]) if measure == "prefill" else cells[0]
    peers, rows = _peer_systems(results), []
    for contestant in _measured(results):
        row = [_figure(same(contestant, cell)) for cell in cells]
        rows.append([contestant["name"], *row, *(_beside(contestant, results, p, beside) for p in peers)])
    marks = ["mixture" * (c["role"] == "model") for c in _measured(results)]
    return Table.of("", ["", *lengths, *(f">x {peer}" for peer in peers)], rows, marks=marks)


def many_users(results: Mapping[str, Any]) -> Table:
    """One row a contestant and context: tokens/s of all users together, how many times those of one user that is, and
    how long the median user waits for the first token when all ask at once."""
    users = sorted({c["users"] for c in results["contestants"][0]["cells"]})
    rows = []
    for contestant in _measured(results):
        contexts = dict.fromkeys(c["length"] for c in contestant["cells"] if c["measure"] == "decode")
        for context in contexts if contestant["role"] != "price" else ():
            rows.append(
                [contestant["name"], f"{context}", *(_batch(contestant, context, count) for count in users)]
            )
    return Table.of("", ["", ">behind", *(f">{n} user{'s' * (n > 1)}" for n in users)], rows)


def memory(results: Mapping[str, Any]) -> Table:
    """Weights, and what the process holds of memory once loaded and at most."""
    columns = {
        "weights": "weights",
        "resident": "process",
        "resident_peak": "at most",
        "device": "on the GPU",
    }
    shown = {
        k: v for k, v in columns.items() if any(c["memory_bytes"].get(k) for c in results["contestants"])
    }
    rows = [
        [c["name"], *(human(s, "B") if (s := c["memory_bytes"].get(key)) else NOTHING for key in shown)]
        for c in _measured(results)
    ]
    return Table.of("", ["", *(f">{title}" for title in shown.values())], rows)


def expert_store(results: Mapping[str, Any]) -> Table | None:
    """One row a cell of a contestant whose experts are not all in memory."""
    cells = [(c["name"], cell) for c in _measured(results) for cell in c["cells"] if cell.get("expert_store")]
    rows = []
    for name, cell in cells:
        found, users = cell["expert_store"], cell["users"]
        shares = percent(found["hit_rate"], 1), percent(found["uniform_hit_rate"], 1)
        a_token = human(found["bytes_per_token"], "B"), f"{1000 * found['stall_seconds_per_token']:.1f} ms"
        budget = f"{human(found['budget_bytes'], 'B')} of {human(found['expert_bytes'], 'B')}"
        rows.append([name, f"{cell['length']}", f"{users}", budget, *shares, *a_token])
    head = ["", ">behind", ">users", ">in memory", ">hits", ">by chance", ">read", ">waited"]
    return Table.of("", head, rows) if rows else None


def price_line(results: Mapping[str, Any]) -> str:
    """What being a mixture costs, by quantisation."""
    parts = []
    for quantize, row in results["summary"]["price"].items():
        shares = ", ".join(f"{name} {share:.2f}" for name, share in sorted(row.items()) if share)
        parts += [f"{'not quantised' if quantize == 'none' else quantize}: {shares}"] if shares else []
    return "\nwriting speed over that of one dense member: " + "; ".join(parts) if parts else ""


def _title(what: str, how: str) -> str:
    return f"\n[bold]{what}[/]: [dim]{how}[/]"


def _measured(results: Mapping[str, Any]) -> list[Contestant]:
    return [c for c in results["contestants"] if not c["failed"]]


def _peer_systems(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(c["system"] for c in _measured(results) if c["role"] == "peer"))


def same(contestant: Contestant, cell: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """This contestant's figures for the same thing; None where it was not measured there."""
    key = ("measure", "length", "users")
    return next((c for c in contestant["cells"] if all(c[k] == cell[k] for k in key)), None)


def _figure(cell: Mapping[str, Any] | None) -> Cell:
    """1,234 (1,200-1,250)  45 %  0.8 ms: share and time where they are known."""
    if cell is None or cell["tokens_per_s"]["median"] is None:
        return Cell(NOTHING)
    found = cell["tokens_per_s"]
    share = cell.get("mfu") if cell["measure"] == "prefill" else cell.get("mbu_now", {}).get("median")
    told = f"({_number(found['min'])}-{_number(found['max'])})"
    told += f" {100 * share:3.0f} %" if share is not None else "      "
    told += f" {1000 * cell['tpot_s']['median']:5.1f} ms" if "tpot_s" in cell else ""
    return Cell(_number(found["median"]), found["median"], small=told)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _beside(contestant: Contestant, results: Mapping[str, Any], system: str, cell: Mapping[str, Any]) -> str:
    """Times the speed of the peer of this kind whose weights are the most similar in size."""
    if contestant["role"] == "peer":
        return ""
    peer = nearest(contestant, [c for c in _measured(results) if c["system"] == system])
    key = (cell["measure"], cell["length"], cell["users"])
    times = ratio(speed(contestant, key), speed(peer, key)) if peer else None
    return f"{times:.2f}" if times is not None else NOTHING


def _batch(contestant: Contestant, context: int, users: int) -> Cell:
    total = speed(contestant, ("decode", context, users))
    if total is None:
        return Cell(NOTHING)
    alone = speed(contestant, ("decode", context, 1))
    cell = same(contestant, {"measure": "decode", "length": context, "users": users})
    wait = cell["ttft_s"]["median"] if cell else None
    told = [f"(x {total / alone:.1f})"] if alone and users > 1 else []
    return Cell(_number(total), total, small=" ".join(told + ([_seconds(wait)] if wait is not None else [])))


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
