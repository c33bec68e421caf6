"""Carrying out a plan: one streaming loop from members to a mixture on disk.

    combine(plan, Path("mixture"))

The calibration pass reads the weights of a layer, hands them to the writer, sends the text through them and shows the
fitter what the router would see: each weight is read once. What it did not need is copied after it, file to file where
bytes are the same, several shards at a time. Then routers, side files, index, rename: an
interrupted run leaves nothing that loads, and a long one what the same command goes on with. Peak memory is one layer
of one member and the calibration states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from octad.checkpoint.hub_card import hub_facts
from octad.checkpoint.names import router_name
from octad.checkpoint.provenance import PROVENANCE, Provenance, found_at
from octad.checkpoint.writer import CheckpointWriter
from octad.combine.calibrate import BETWEEN, Settle, Texts, gate_inputs
from octad.combine.fit import Calibration, Fitter, RouterFit, fitter_of
from octad.combine.journal import Journal, identity_of
from octad.combine.layer_parts import Write, forget
from octad.combine.members import MemberReport
from octad.combine.mixture import MixtureSource
from octad.combine.preflight import Plan
from octad.combine.recipe import Recipe
from octad.combine.refit import Refit
from octad.combine.regmean import Regression
from octad.combine.sidecars import CARD, STATISTICS, model_card, save_statistics
from octad.dist import World, compute_dtype, product_rate
from octad.model import cost
from octad.model.config import ModelConfig, dense_config
from octad.model.rope import Rope
from octad.telling import Progress, Tell, quiet, silent
from octad.text.tokenizer import Tokenizer
from octad.text.windows import Window

DEFAULT_SHARD_BYTES = 5e9


def combine(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: float = DEFAULT_SHARD_BYTES,
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Path:
    """Write the mixture of a plan to `output` (atomically) and return its path; by all processes of torchrun where there
    are several (together.py). A long run that was cut short is gone on with (journal.py). Raises OutputError,
    DataError."""
    options: dict[str, Any] = {"overwrite": overwrite, "max_shard_bytes": max_shard_bytes}
    if (world := World.join()).size > 1:
        from octad.combine.together import combine_together

        return combine_together(plan, output, world, progress=progress, tell=tell, **options)
    calibrations, dtype = plan.calibrations, compute_dtype()
    source = plan.source()
    fitter = fitter_of(plan.recipe.router, plan.config, calibrations, plan.generalist, dtype)
    journal = Journal(identity_of(plan, fitter.runs, str(dtype), max_shard_bytes), tell)
    writer = CheckpointWriter(output, plan.tensors, adopt=journal.fits, **options)
    with ThreadPoolExecutor(1) as background, writer, journal.kept():
        origins = background.submit(source.provenance)
        journal.begin(writer, fitter)
        fit = write_and_fit(writer, source, fitter, dtype, progress, plan.repair_texts, journal)
        provenance = plan_provenance(plan, calibrations, origins.result())
        write_sidecars(writer, plan.config_dict, plan.tokenizer, provenance, calibrations, fit)
        writer.finish()
        journal.remove()
        return writer.commit()


def expected_seconds(plan: Plan) -> float:
    """A rough forecast: calibration at this machine's matrix-product rate (measured for a moment), and half a GB/s."""
    rate = product_rate(compute_dtype(), seconds=0.05)
    fitted = plan.recipe.router.method in ("ridge", "logistic")
    tokens = sum(len(window.ids) for text in plan.calibrations for window in text.windows) if fitted else 0
    layers = cost.body_parameters(dense_config(plan.config))
    if (
        plan.recipe.repair.method == "closed-form"
    ):  # through mixture and member, and what the regressions take
        tokens += 3 * sum(len(window.ids) for text in plan.repair_texts for window in text)
    return 2 * layers * tokens / (0.4 * rate) + plan.output_bytes / 0.5e9


def write_and_fit(
    writer: CheckpointWriter,
    source: MixtureSource,
    fitter: Fitter,
    dtype: torch.dtype,
    progress: Progress = quiet,
    texts: Sequence[Sequence[Window]] = (),
    journal: Journal | None = None,
) -> RouterFit:
    """Fit the routers, all tensors that this reads being written on the way; then write the others and the routers.
    `texts`: of each expert, for closed-form repair."""
    before = writer.written  # by an earlier run

    def write(name: str, tensor: torch.Tensor, first: int = 0) -> None:
        if name not in before:
            if tensor.shape == source.info(name).shape:
                writer.write(name, tensor)
            else:
                writer.write_rows(name, first, tensor)
        source.settled.pop(name, None)  # nobody reads it again

    for done, steps in settled_inputs(source, fitter, dtype, write, texts, journal):
        progress("calibrating", done / steps)
    fit = fitter.fit()
    write_rest(writer, source, fit, progress, journal)
    return fit


def settled_inputs(
    source: MixtureSource,
    fitter: Fitter,
    dtype: torch.dtype,
    write: Write = forget,
    texts: Sequence[Sequence[Window]] = (),
    journal: Journal | None = None,
) -> Iterator[tuple[int, int]]:
    """The calibration pass, with RegMean where the source asks for it and closed-form repair where there are texts for
    it: shows the fitter its inputs. Yields (steps done, steps in all). The members' own streams of a repair are in no
    journal: such a pass begins anew."""
    settling: list[Settle] = []
    if source.shared.method == "regmean":
        settling.append(Regression(source, fitter.runs, dtype).settle)
    with Refit(source, texts, dtype, first=len(fitter.runs)) as repair:
        if repair.runs:
            settling.append(repair.settle)
        runs = [*fitter.runs, *repair.runs]

        def settle(layer: int, rope: Rope, texts_of: Texts) -> None:
            for each in settling:
                each(layer, rope, texts_of)

        steps = source.config.num_hidden_layers * len(runs)
        refit, passage = (repair.refit, None) if repair.runs else (None, journal)
        done = passage.first * len(runs) if passage else 0
        for layer, number, x_ND in gate_inputs(source, runs, dtype, write, settle, refit, passage):
            if number == BETWEEN:
                continue
            if number < len(fitter.runs):
                fitter.see(layer, number, x_ND)
            done += 1
            yield done, steps


def write_rest(
    writer: CheckpointWriter,
    source: MixtureSource,
    fit: RouterFit,
    progress: Progress,
    journal: Journal | None = None,
) -> None:
    """Everything that the calibration pass has not written yet: the other tensors, then the routers."""
    family, written = source.config.model_type, writer.written
    source.routers = {router_name(family, layer): w for layer, w in enumerate(fit.weights)}
    rest = [name for name in source.names() if name not in written]
    copied = [name for name in rest if source.extent(name) is not None]
    computed = [name for name in rest if source.extent(name) is None]

    def at(done: float) -> None:
        progress("writing", done / len(rest))
        if journal is not None:
            journal.rest()

    writer.copy_all(copied, source, lambda done: at(done * len(copied)))
    for done, name in enumerate(computed, len(copied) + 1):
        writer.write(name, source.read(name))
        at(done)


def plan_provenance(
    plan: Plan, calibrations: Sequence[Calibration], origins: Mapping[str, Any]
) -> Provenance:
    """octad.json of a fresh mixture."""
    experts = [
        expert_record(report, c, origin)
        for report, c, origin in zip(plan.reports, calibrations, origins["members"], strict=True)
    ]
    base = (
        dict(origins["base"])
        | {
            "vocab_size": plan.base.config.vocab_size,
            "path": found_at(origins["base"]["label"]),
        }
        | hub_facts(plan.base)
    )
    return Provenance(recipe_record(plan.recipe), base, experts)


def recipe_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe for octad.json, with the defaults that it was carried out with."""
    router, shared = (section.model_dump(mode="json") for section in (recipe.router, recipe.shared))
    return recipe.to_dict() | {"router": router, "shared": shared}


def expert_record(report: MemberReport, c: Calibration, origin: Mapping[str, Any]) -> dict[str, Any]:
    """One expert's entry in octad.json."""
    return {
        "name": report.name,
        "model": report.reference,
        "path": found_at(origin["label"]),
        "kind": report.kind,
        "exact": report.exact,
        "held": report.held,
        "tokens": c.tokens,
        "windows": len(c.windows),
        "files": origin.get("files", []),
    }


def write_sidecars(
    writer: CheckpointWriter,
    config_dict: Mapping[str, Any],
    tokenizer: Tokenizer,
    provenance: Provenance,
    calibrations: Sequence[Calibration],
    fit: RouterFit,
) -> None:
    """config.json, tokenizer, provenance, statistics and model card."""

    config = ModelConfig.from_dict(config_dict)
    card = model_card(provenance, config_dict, cost.parameters(config), cost.parameters(config, active=True))
    writer.add_json("config.json", config_dict)
    tokenizer.save(writer)
    writer.add_text(PROVENANCE, provenance.to_json())
    writer.add_file(STATISTICS, lambda path: save_statistics(path, calibrations, fit.statistics))
    writer.add_text(CARD, card)
