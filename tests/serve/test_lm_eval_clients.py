"""lm-eval's own clients of OpenAI servers against a running server: the scores of octad evaluate --tasks lm-eval:..."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
from pathlib import Path
from typing import Any

import pytest
from harness_task import CHOICE, make_task
from serving import LIMITS, Running, running, served_mixture, start
from tiny_chat import make_mixture
from tiny_models import TinyCheckpoint

from octad.engine.llm import LLM
from octad.evaluate.tasks.harness import HarnessTask

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'octad[eval]'")
pytest.importorskip("tenacity", reason="lm-eval's clients need lm-eval[api]")
pytestmark = pytest.mark.slow

WRITE = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]"""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def asked(task: Path, model: str, **arguments: Any) -> dict[str, Any]:
    """What lm-eval finds through its client `model`."""
    from lm_eval.tasks import TaskManager

    chat = {"apply_chat_template": True} if "chat" in model else {}
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        model_args=arguments | {"model": "mixture", "num_concurrent": 3, "max_retries": 1},
        tasks=[str(task)],
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
        **chat,
    )
    return found


def test_local_completions(running: Running, served_mixture: Path, tmp_path: Path) -> None:
    task = make_task(tmp_path, "octad_served_choice", CHOICE, 9)
    found = asked(
        task,
        "local-completions",
        base_url=running.url + "/v1/completions",
        tokenizer=str(served_mixture),
        tokenizer_backend="huggingface",
    )
    own = HarnessTask(str(task)).measure(LLM(served_mixture, dtype="float32"))["octad_served_choice"]
    results = found["results"]["octad_served_choice"]
    assert {m.metric: m.score().value for m in own} == {
        "acc": results["acc,none"],
        "acc_norm": results["acc_norm,none"],
    }
    assert 0 < results["acc,none"] < 1 or 0 < results["acc_norm,none"] < 1
    write = make_task(tmp_path, "octad_served_write", WRITE, 9)
    texts = asked(
        write,
        "local-completions",
        base_url=running.url + "/v1/completions",
        tokenizer=str(served_mixture),
        tokenizer_backend="huggingface",
    )
    assert said(texts, "octad_served_write") == said(by_octad(write, served_mixture), "octad_served_write")


def test_local_chat_completions(start: Any, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """A model whose chat template is the text itself is asked the same by chat and without."""
    source = tiny_checkpoint("mixtral", vocab_size=257, max_position_embeddings=4096)
    directory = make_mixture(
        source, tmp_path / "plain", "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    server = start(model=directory)
    task = make_task(tmp_path, "octad_served_chat", WRITE, 9)
    found = asked(
        task, "local-chat-completions", base_url=server.url + "/v1/chat/completions", tokenizer_backend=None
    )
    own = by_octad(task, directory)
    assert said(found, "octad_served_chat") == said(own, "octad_served_chat")
    name = "exact_match,none"
    assert found["results"]["octad_served_chat"][name] == own["results"]["octad_served_chat"][name]


def by_octad(task: Path, model: Path) -> dict[str, Any]:
    """What `octad evaluate --tasks` asks and finds."""
    from lm_eval.tasks import TaskManager

    from octad.evaluate.lm_eval_adapter import OctadLM

    found: dict[str, Any] = lm_eval.simple_evaluate(
        OctadLM(LLM(model, dtype="float32")),
        tasks=[str(task)],
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )
    return found


def said(found: dict[str, Any], name: str) -> list[Any]:
    """The texts, in the order of the questions; the server leaves out what a cut leaves of a character."""
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return [[text.rstrip("\ufffd") for text in sample["filtered_resps"]] for sample in samples]
