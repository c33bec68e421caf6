"""The rest of the small world of files: GGUF, vocabularies of other forms, data sets, plans, forms of answers, requests.

more_seeds(directory)         # after damaged_files.seeds made the base and the mixture
"""

import json
import shutil
from pathlib import Path

VISIBLE = [{"role": "user", "content": "a river"}]
BODIES = {
    "chat": {"model": "mixture", "messages": VISIBLE, "max_tokens": 4, "temperature": 0.5, "seed": 1, "logprobs": True,
             "top_logprobs": 2, "stop": ["x"], "stream": False, "tools": [{"type": "function", "function": {
                 "name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}}]},
    "completions": {"model": "mixture", "prompt": ["a", "b"], "max_tokens": 4, "n": 2, "echo": True, "logprobs": 1},
    "messages": {"model": "mixture", "messages": VISIBLE, "max_tokens": 4, "system": "Be brief.", "top_k": 5},
    "responses": {"model": "mixture", "input": VISIBLE, "max_output_tokens": 4, "instructions": "Be brief."},
}  # fmt: skip
PATHS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}


def more_seeds(directory: Path) -> None:
    """Everything that more_readers read, whole."""
    _models(directory)
    _vocabularies(directory)
    _plans(directory)
    _forms(directory)
    import datasets

    rows = [json.loads(line) for line in (directory / "text-1.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(directory / "dataset")
    (directory / "pretrain.yaml").write_text(
        "task: pretrain\nmode: mixture\ntokenizer: base\nsteps: 2\n"
        "architecture: {size: 1, width: 32, heads: 2, num_experts: 2, top_k: 1}\n"
        "data: {window: 16, sources: [{name: one, files: text-1.jsonl}]}\nbatch: {windows: 2, micro: 2}\n"
    )
    (directory / "mix" / "training.json").write_text(json.dumps([{"task": "tune", "steps": 3}]))
    (directory / "mix" / "README.md").write_text(
        "---\nlibrary_name: transformers\n---\n# mix\n\n<!-- octad verdict: 64 tokens -->\n## Verdict\n\n**Good.**\n\n"
        "- more\n<!-- end of octad verdict -->\n"
    )


def _models(directory: Path) -> None:
    import gguf
    from gguf_files import gguf_of
    from members import edit_config, save_tokenizer
    from tiny_models import make_model

    from octad.checkpoint.load import open_source
    from octad.export.gguf_file import write_gguf
    from octad.fast.saved import save_quantized

    gguf_of(directory / "base", directory / "float.gguf", template="{{ messages[0].content }}")
    gguf_of(directory / "base", directory / "rounded.gguf", gguf.GGMLQuantizationType.Q4_0)
    write_gguf(open_source(directory / "mix"), directory / "mixture.gguf", "q8_0")
    save_quantized(open_source(directory / "mix"), directory / "int4", "int4")
    for family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        made = make_model(family, vocab_size=257, num_hidden_layers=1, mlp_only_layers=[])
        made.save_pretrained(directory / family)
        save_tokenizer(directory / family)
    shutil.copytree(directory / "mix", directory / "talks")
    edit_config(directory / "talks", max_position_embeddings=1024)
    (directory / "talks" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    )


def _vocabularies(directory: Path) -> None:
    from sentencepiece_file import model_of
    from vocabularies import sentencepiece

    made = sentencepiece()
    for name in ("pieces", "older", "bare"):
        shutil.copytree(directory / "base", directory / name)
        (directory / name / "tokenizer.json").unlink()
    for name, text in made.files().items():
        (directory / "pieces" / name).write_text(text)
    (directory / "bare" / "tokenizer.model").write_bytes(model_of([f"piece{n}" for n in range(257)]))
    (directory / "older" / "vocab.json").write_text(json.dumps({f"t{n}": n for n in range(250)}))
    (directory / "older" / "added_tokens.json").write_text(json.dumps({"<|x|>": 250, "<|y|>": 251}))
    from gguf import GGUFWriter

    from octad.export.gguf_vocabulary import add_vocabulary, vocabulary_values

    writer = GGUFWriter(directory / "pieces.gguf", "llama")
    add_vocabulary(writer, vocabulary_values(made, made.vocab_size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _plans(directory: Path) -> None:
    (directory / "hardware.yaml").write_text(
        "devices:\n  mine:\n    title: a card\n    tflops: {value: 120, how: seen, source: me}\n    memory: 24\n"
        "    bandwidth: 900\n    link: 50\n    network: 25\n    host: 32\n    node: 8\n    watts: 300\n"
        "    dollars: [0.5, 1.5]\n"
    )
    shutil.copy(directory / "recipe.yaml", directory / "planned.yaml")
    shutil.copy(directory / "mix" / "config.json", directory / "planned.json")


def _forms(directory: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    }
    (directory / "schema.json").write_text(json.dumps(schema))
    (directory / "grammar.lark").write_text(
        'start: "a" word+\nword: /[a-z]{1,9}/ " " | number\nnumber: /[0-9]+/\n'
    )
    (directory / "pattern.txt").write_text(r"(\d{2,4}-){3}[a-f]+|(yes|no)?\s*end")
    (directory / "keys.txt").write_text("# keys\nsecret-1\nsecret-2\n")
    (directory / "require.txt").write_text("mean<=oracle, every<=member*1.01, one<=2.5")
    (directory / "bodies").mkdir()
    for name, body in BODIES.items():
        (directory / "bodies" / f"{name}.json").write_text(json.dumps(body))
