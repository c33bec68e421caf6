"""octad on a GPU that is not there (tests/helpers/pretended_gpu.py): engine and training take its code for CUDA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cases
import pretended_gpu
import pytest
from small import checkpoint
from tiny_models import FAMILIES, TinyCheckpoint

QUICK = [
    "every_family_answers_as_on_the_cpu",
    "sampling_grammar_and_penalties_answer_as_on_the_cpu",
    "attention_over_pages_equals_its_twin",
    "the_host_waits_for_nothing_in_a_layer",
    "a_step_of_decoding_can_be_captured",
    "steps_of_decoding_are_recorded_and_repeated",
    "everything_learns_as_on_the_cpu",
    "documents_of_many_lengths_are_one_call",
    "a_run_resumes_to_the_same_bits",
]
SLOW = [
    "what_cannot_be_recorded_is_launched_one_by_one",
    "a_recomputed_block_keeps_its_routing",
    "single_experts_work",
    "rounded_weights_answer_as_on_the_cpu",
    "routers_learn_as_on_the_cpu",
    "repair_learns_as_on_the_cpu",
    "muon_learns_as_on_the_cpu",
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What went wrong in each of some cases, run together: starting costs as much as they do."""
    if why := pretended_gpu.cannot():
        pytest.skip(why)
    work = tmp_path_factory.mktemp("gpu")
    models = {family: str(tiny_checkpoint(family)) for family in FAMILIES}
    models["mixtral"] = str(checkpoint(tiny_checkpoint("mixtral", num_local_experts=4), work / "mixtral"))
    asked = {"names": request.param, "models": models, "work": str(work)}
    paths = [str(Path(pretended_gpu.__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, cases.__file__, json.dumps(asked)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("outcomes", [QUICK], indirect=True, ids=["quick"])
@pytest.mark.parametrize("name", QUICK)
def test_on_the_pretended_gpu(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]


@pytest.mark.slow
def test_the_check_for_machines_with_a_gpu_runs(tmp_path: Path) -> None:
    """On the pretended one, where transformers computes on the CPU beside it: all that it can find wrong is right."""
    if why := pretended_gpu.cannot():
        pytest.skip(why)
    script = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
    command = [sys.executable, script, "--pretended", "-o", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert {name for name, found in checks.items() if found["ok"]} == set(checks)
    assert checks["training"]["octad_loss"] == pytest.approx(
        checks["training"]["transformers_loss"], rel=1e-4
    )
    assert checks["training"]["octad_norm"] == pytest.approx(
        checks["training"]["transformers_norm"], rel=1e-3
    )
    assert checks["answering"]["same_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("outcomes", [SLOW], indirect=True, ids=["slow"])
@pytest.mark.parametrize("name", SLOW)
def test_more_on_the_pretended_gpu(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == "", outcomes[name]
