"""lm-eval tasks of a few questions, as files: what octad's own runs and lm-eval's are both asked."""

import json
from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
{rest}
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]"""


def make_task(directory: Path, name: str, rest: str, count: int, longest: int | None = None) -> Path:
    """A task of `count` questions; number `longest` is longer than a tiny model's context of 128."""
    data = directory / "data.jsonl"
    rows = [
        {
            "question": "a long text " * 30 if n == longest else f"What is {n} and {n + 1}? ",
            "choices": [f"{n}", "none, ever", "x" * (n + 1)],
            "answer": n % 3,
        }
        for n in range(count)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = directory / f"{name}.yaml"
    file.write_text(TASK.format(name=name, data=data, rest=rest))
    return file
