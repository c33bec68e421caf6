"""The independent runs of `octad branch` all at once, over a Ray cluster: each specialist is a task of its own.

    fan_out(config, Path("specialists"), echo=print, progress=bar)

A task asks for its own CPUs and GPUs, and waits until the cluster has them. It trains in a directory of its name, which
every machine has to see under the same path; so a task that is run again, because its worker was lost or because the
whole command is given again, goes on from its last state, and a failure stays alone. Workers tell steps and lines to one
small actor, which the command asks twice a second. Ctrl-C and SIGTERM stop every worker after its step, saved. With
`ray.processes` above 1 a task waits for several processes that train together (rank_tasks.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octad.errors import OctadError, RecipeError
from octad.telling import Progress, quiet
from octad.text.documents import optional
from octad.train.branch import chosen, raise_failed, train_specialist
from octad.train.run_config import BranchConfig, RaySpec, SpecialistSpec
from octad.train.signals import StopRequest, Throttle
from octad.train.trainer import Outcome, TrainingStopped

EVERY = 0.5  # seconds between two looks at the workers


class Board:
    """The actor that workers tell things to: the newest share done of each, and lines not yet taken."""

    def __init__(self) -> None:
        self.done: dict[str, float] = {}
        self.lines: list[str] = []
        self.ends: dict[str, tuple[str, str]] = {}
        self.stopping = False

    def show(self, name: str, done: float) -> None:
        """A worker's share done."""
        self.done[name] = done

    def tell(self, line: str) -> None:
        """A line for the user."""
        self.lines.append(line)

    def end(self, name: str, how: tuple[str, str]) -> None:
        """How a specialist of several processes ended, and why."""
        self.ends[name] = how

    def ended(self, name: str) -> tuple[str, str]:
        """The same, once it is known."""
        return self.ends.pop(name)

    def stop(self) -> None:
        """Ask the processes to stop after their step."""
        self.stopping = True

    def stops(self) -> bool:
        """Whether they are to."""
        return self.stopping

    def take(self) -> tuple[dict[str, float], list[str]]:
        """Everything that is new."""
        found = self.done, self.lines
        self.done, self.lines = {}, []
        return found


def fan_out(
    config: BranchConfig,
    output: Path,
    *,
    echo: Callable[[str], None],
    progress: Progress = quiet,
    only: str | None = None,
) -> Outcome:
    """What branch.branch does, in parallel. Raises TrainingStopped naming those that failed, RecipeError, DataError."""
    ray = optional("ray", "--ray", "ray")
    specialists = chosen(config, only)
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, config.ray)
    try:
        return _carry_out(ray, config, specialists, output, echo, progress)
    except ray.exceptions.RayError as error:
        words = str(error).strip().split("\n")[0]
        raise TrainingStopped(f"the Ray cluster was lost ({words}); the same command goes on") from None
    finally:
        if mine:
            ray.shutdown()


def _carry_out(
    ray: Any,
    config: BranchConfig,
    specialists: list[SpecialistSpec],
    output: Path,
    echo: Callable[[str], None],
    progress: Progress,
) -> Outcome:
    board = ray.remote(num_cpus=0)(Board).remote()
    names, whole = _started(ray, config, specialists, str(output), board), config.ray.processes == 1
    each = "" if whole else f", {config.ray.processes} processes each"
    echo(f"{len(names)} specialists{each} over a cluster of {_size(ray)}")
    failed: dict[str, str] = {}
    outcomes, waiting = set[Outcome](), list(names)
    with StopRequest() as stop:
        asked = False
        while waiting:
            if stop.requested and not asked:
                asked = True
                board.stop.remote()
                for reference in waiting if whole else ():
                    ray.cancel(reference)
            done, waiting = ray.wait(waiting, timeout=EVERY)
            _show(ray, board, echo, progress)
            for reference in done:
                outcome, why = _result(ray, reference, names[reference])
                if why:
                    echo(f"{names[reference]}: failed: {why}")
                    failed[names[reference]] = why
                outcomes.add(outcome)
    _show(ray, board, echo, progress)
    if Outcome.STOPPED in outcomes:
        return Outcome.STOPPED
    raise_failed(failed)
    return Outcome.FINISHED


def _started(
    ray: Any, config: BranchConfig, specialists: list[SpecialistSpec], output: str, board: Any
) -> dict[Any, str]:
    """A task for each specialist, by its name: it trains, or waits for the processes that do."""
    resources, here = _request(ray, config.ray), os.getcwd()
    if config.ray.processes == 1:
        task = ray.remote(max_retries=config.retries, retry_exceptions=False, **resources)(_work)
        return {task.remote(config, s, output, here, config.ray.cpus, board): s.name for s in specialists}
    from octad.train.rank_tasks import train_over

    task = ray.remote(max_retries=0, num_cpus=0)(train_over)
    gpus = resources["num_gpus"]
    return {task.remote(config, s, output, here, gpus, board): s.name for s in specialists}


def _work(
    config: BranchConfig, specialist: SpecialistSpec, output: str, here: str, cpus: float, board: Any
) -> tuple[str, str]:
    """One specialist, on a worker: how it ended, and why it failed where it did."""
    os.chdir(here)  # so that relative paths mean what they do for the user
    torch.set_num_threads(max(1, int(cpus)))
    try:
        show = Throttle(board.show.remote)
        outcome = train_specialist(config, specialist, Path(output), board.tell.remote, show)
    except OctadError as error:
        return "failed", str(error)
    return outcome.value, ""


def _result(ray: Any, reference: Any, name: str) -> tuple[Outcome, str]:
    """How a task ended; a worker that was lost once too often is a failure."""
    try:
        ended, why = ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        return Outcome.STOPPED, ""
    except ray.exceptions.RayError as error:
        return Outcome.FINISHED, f"its worker was lost ({' '.join(str(error).split())[:200]})"
    return (Outcome.FINISHED, why) if ended == "failed" else (Outcome(ended), "")


def _show(ray: Any, board: Any, echo: Callable[[str], None], progress: Progress) -> None:
    done, lines = ray.get(board.take.remote())
    for line in lines:
        echo(line)
    for name, share in done.items():
        progress(name, share)


def _connect(ray: Any, spec: RaySpec) -> None:
    address = spec.address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())[:200]
        raise RecipeError(f"ray.address: no Ray cluster at {address or 'this machine'} ({words})") from None


def _request(ray: Any, spec: RaySpec) -> dict[str, float]:
    """Each task's CPUs and GPUs. Raises RecipeError for what no machine of the cluster has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = spec.gpus
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0
    if not any(node.get("CPU", 0) >= spec.cpus and node.get("GPU", 0) >= gpus for node in nodes):
        most = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise RecipeError(f"ray: no machine has {spec.cpus:g} CPUs and {gpus:g} GPUs (there are: {most})")
    for kind, each in (("CPU", spec.cpus), ("GPU", gpus)):
        if (there := sum(node.get(kind, 0) for node in nodes)) < each * spec.processes:
            raise RecipeError(
                f"ray: {spec.processes} processes need {each * spec.processes:g} {kind}s, the cluster has {there:g}"
            )
    return {"num_cpus": spec.cpus, "num_gpus": gpus}


def _size(ray: Any) -> str:
    have = ray.cluster_resources()
    return f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
