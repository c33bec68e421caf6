"""A Modelfile for Ollama beside a GGUF file.

    modelfile(tokenizer, "octad.gguf")        # text, and whether a chat template is in it

Ollama's templates are Go's, not Jinja's, and are not translated: the one for ChatML (which SmolLM2 and Qwen speak) is
written where the model's own template gives ChatML, with the system text that it puts in front of a conversation
that brings none. Otherwise the line is left out, and Ollama uses what it reads in the file.
"""

from __future__ import annotations

import re

from octad.text.tokenizer import Tokenizer

CHATML = """TEMPLATE \"\"\"{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{- range .Messages }}{{- if ne .Role "system" }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}{{- end }}<|im_start|>assistant
\"\"\"
PARAMETER stop "<|im_start|>"
PARAMETER stop "<|im_end|>"
"""
QUESTION, ANSWER = "one question", "one answer"


def modelfile(tokenizer: Tokenizer, file: str) -> tuple[str, bool]:
    """The Modelfile of a GGUF file of this name, and whether it holds a template."""
    system = chatml_system(tokenizer)
    if system is None:
        return f"FROM ./{file}\n", False
    said = f'SYSTEM """{system}"""\n' if system else ""
    return f"FROM ./{file}\n{CHATML}{said}", True


def chatml_system(tokenizer: Tokenizer) -> str | None:
    """The system text that the model's template adds by itself ("" for none); None where its conversations are not
    ChatML."""
    if tokenizer.chat_template is None:
        return None
    talk = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ]
    found = re.fullmatch(
        r"(?:<\|im_start\|>system\n(.*?)<\|im_end\|>\n)?"
        + "".join(f"<\\|im_start\\|>{turn['role']}\n{turn['content']}<\\|im_end\\|>\n" for turn in talk)
        + r"<\|im_start\|>assistant\n",
        tokenizer.apply_chat_template(talk),
        re.DOTALL,
    )
    return None if found is None else found[1] or ""
