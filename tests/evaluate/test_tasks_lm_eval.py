"""octad inside lm-eval against lm-eval's own model class of transformers: the same task, the same numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness_task import CHOICE, make_task
from members import make_base

from octad.engine.llm import LLM
from octad.errors import DataError
from octad.evaluate.tasks.harness import HarnessTask
from octad.evaluate.tasks.run_tasks import run_tasks

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install 'octad[eval]'")

WRITE = """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]"""
ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_base(tmp_path_factory.mktemp("lm-eval") / "base", "llama")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def both(base: Path, task: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What lm-eval finds with octad's model, and with transformers'."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from octad.evaluate.lm_eval_adapter import OctadLM

    models = (
        OctadLM(LLM(base, dtype="float32")),
        HFLM(str(base), dtype="float32", device="cpu", batch_size=1),
    )
    options = {"bootstrap_iters": 0, "log_samples": True, "task_manager": TaskManager(include_defaults=False)}
    mine, theirs = (lm_eval.simple_evaluate(model, tasks=[str(task)], **options) for model in models)
    return mine, theirs


def test_log_likelihoods_are_those_of_its_transformers_model(base: Path, tmp_path: Path) -> None:
    mine, theirs = both(base, make_task(tmp_path, "octad_test_choice", CHOICE, 7, longest=3))
    for own, other in zip(*(r["samples"]["octad_test_choice"] for r in (mine, theirs)), strict=True):
        for (nats, greedy), (their_nats, their_greedy) in zip(
            own["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(nats) == pytest.approx(float(their_nats), rel=1e-4)
            assert greedy == their_greedy
    assert (
        mine["results"]["octad_test_choice"]["acc,none"] == theirs["results"]["octad_test_choice"]["acc,none"]
    )
    (measured, normed) = HarnessTask(str(tmp_path / "octad_test_choice.yaml")).measure(
        LLM(base, dtype="float32")
    )["octad_test_choice"]
    assert (measured.metric, normed.metric) == ("acc", "acc_norm")
    assert measured.score().value == theirs["results"]["octad_test_choice"]["acc,none"]
    assert normed.score().value == theirs["results"]["octad_test_choice"]["acc_norm,none"]


def test_generated_texts_are_those_of_its_transformers_model(base: Path, tmp_path: Path) -> None:
    mine, theirs = both(base, make_task(tmp_path, "octad_test_write", WRITE, 7, longest=3))
    texts = [[s["filtered_resps"] for s in r["samples"]["octad_test_write"]] for r in (mine, theirs)]
    assert texts[0] == texts[1]
    assert any(texts[0])


def test_rolling_log_likelihoods_are_those_of_its_transformers_model(base: Path, tmp_path: Path) -> None:
    file = make_task(tmp_path, "octad_test_rolling", ROLLING, 7, longest=3)
    mine, theirs = both(base, file)
    value = theirs["results"]["octad_test_rolling"]["bits_per_byte,none"]
    assert mine["results"]["octad_test_rolling"]["bits_per_byte,none"] == pytest.approx(value, rel=1e-4)
    (row,) = run_tasks(base, [f"lm-eval:{file}"], dtype="float32")
    assert (row["kind"], row["metric"], row["higher_is_better"]) == ("lm-eval", "bits_per_byte", False)
    assert row["scores"]["model"]["value"] == pytest.approx(value, rel=1e-4)


CHAT = """{% for m in messages %}{{ bos_token if loop.first }}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def chat_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template writes the begin token, and whose tokenizer adds one by itself too."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        ["the river and the sea"] * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
    names = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|begin|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": core.get_vocab_size()}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads, **ids))
    directory = tmp_path_factory.mktemp("lm-eval-chat")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_templated_chat_is_read_as_its_transformers_model_reads_it(
    chat_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from octad.evaluate.lm_eval_adapter import OctadLM

    theirs = HFLM(str(chat_base), dtype="float32", device="cpu", batch_size=1)
    mine = OctadLM(LLM(chat_base, dtype="float32"))
    chat = [{"role": "user", "content": "the river"}, {"role": "assistant", "content": "and the "}]
    for history, generate in ((chat[:1], True), (chat, False)):
        assert mine.apply_chat_template(history, generate) == theirs.apply_chat_template(history, generate)
    prompt = mine.apply_chat_template(chat[:1])
    assert mine.tok_encode(prompt) == theirs.tok_encode(prompt)
    assert mine.tok_encode(prompt).count(0) == 1  # one begin token, the template's
    assert mine.tok_encode("the sea") == theirs.tok_encode("the sea")
    assert mine.tok_encode("the sea")[0] == 0
    seen: list[list[int]] = []
    submit = mine.llm.submit

    def spy(tokens: list[int], *rest: Any, **named: Any) -> Any:
        seen.append(list(tokens))
        return submit(tokens, *rest, **named)

    monkeypatch.setattr(mine.llm, "submit", spy)
    arguments = (prompt, {"until": [], "max_gen_toks": 6})
    ask = [Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)]
    assert mine.generate_until(ask) == theirs.generate_until(ask, disable_tqdm=True)
    assert seen == [theirs.tok_encode(prompt)]
    pair = [Instance(request_type="loglikelihood", doc={}, arguments=(prompt, " the sea"), idx=0)]
    ((nats, greedy),) = mine.loglikelihood(pair)
    ((their_nats, their_greedy),) = theirs.loglikelihood(pair, disable_tqdm=True)
    assert (nats, greedy) == (pytest.approx(their_nats, rel=1e-4), their_greedy)


def test_an_empty_continuation_is_refused_by_both(chat_base: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from octad.evaluate.lm_eval_adapter import OctadLM

    ask = [Instance(request_type="loglikelihood", doc={}, arguments=("the river", ""), idx=0)]
    with pytest.raises(AssertionError):
        HFLM(str(chat_base), dtype="float32", device="cpu", batch_size=1).loglikelihood(
            ask, disable_tqdm=True
        )
    mine = OctadLM(LLM(chat_base, dtype="float32"))
    with pytest.raises(DataError, match="continuation 1 of 1: has 0 tokens"):
        mine.loglikelihood(ask)
    ask[0].arguments = ("the river", " sea" * 129)
    with pytest.raises(DataError, match="and must have 1 to 128"):
        mine.loglikelihood(ask)


def test_a_broken_task_is_one_line(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: nowhere.jsonl}}\n")
    with pytest.raises(DataError, match=r"lm-eval cannot run it \(.*nowhere.jsonl"):
        run_tasks(base, [f"lm-eval:{file}"])


@pytest.mark.slow  # lm-eval reads thousands of files to know its own tasks
def test_names_are_lm_evals() -> None:
    assert HarnessTask.named("arc_easy").name == "arc_easy"
    with pytest.raises(DataError, match="lm-eval has no such task"):
        HarnessTask.named("no_such_task_at_all")


@pytest.mark.slow
def test_its_own_command_line_knows_octad(base: Path, tmp_path: Path) -> None:
    file = make_task(tmp_path, "octad_test_cli", CHOICE, 7, longest=3)
    command = [
        sys.executable,
        "-m",
        "octad.evaluate.lm_eval_adapter",
        "run",
        "--model",
        "octad",
        "--tasks",
        file,
    ]
    done = subprocess.run(
        [*command, "--model_args", f"pretrained={base},dtype=float32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "octad_test_cli" in done.stdout
    wrong = subprocess.run([*command, "--model_args", "pretrained=/nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("octad: /nowhere: no such file or directory")
