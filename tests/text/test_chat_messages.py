"""Messages as clients of the OpenAI protocol send them, against transformers' rendering of the plain form."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from members import save_tokenizer

from octad.errors import CheckpointError, DataError
from octad.text.chat_template import render_chat
from octad.text.tokenizer import Tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
STRICT = """{%- for m in messages -%}
{%- if m.role == 'system' and not loop.first -%}{{ raise_exception('system must come first') }}{%- endif -%}
{%- if m.role == 'user' and loop.previtem and loop.previtem.role == 'user' -%}
{{ raise_exception('roles must alternate') }}{%- endif -%}
[{{ m.role }}]{{ m.content + '' }}{%- endfor -%}"""
TOOLS = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}({{ c.function.name }} {{ c.function.arguments | tojson }})"
    "{% endfor %}{% endif %}{% endfor %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(template: str, messages: list[Any], **variables: Any) -> str:
    return render_chat(template, messages, {"tools": None, **variables}, "model")


def test_parts_and_nulls_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    messages = [
        {"role": "user", "content": parts, "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "c1"},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
    ]
    expected = (
        '<user>abc|<assistant><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>|'
        "<user><tool_response>2</tool_response>|<assistant>|"
    )
    assert said(PLAIN, messages) == expected
    assert said(TOOLS, messages) == '[user]abc[assistant](add {"a": 1})[tool]2[assistant]'


def test_a_template_that_knows_no_tools_is_told_them() -> None:
    told = said(PLAIN, [{"role": "user", "content": "hi"}], tools=[TOOL])
    assert json.dumps(TOOL) in told
    assert told.startswith("<system>You may call functions.")
    both = said(
        PLAIN, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], tools=[TOOL]
    )
    assert both.startswith("<system>Be brief.\n\nYou may call functions.")
    assert said(TOOLS, [{"role": "user", "content": "hi"}], tools=[TOOL]) == f"T{json.dumps([TOOL])}[user]hi"


def test_an_order_that_the_template_refuses_becomes_a_simpler_one() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "developer", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    assert said(STRICT, messages) == "[user]a\n\nb\n\nc[assistant]d[user]e"
    assert said(STRICT, [{"role": "developer", "content": "x"}]) == "[system]x"
    with pytest.raises(DataError, match=r"refuses these messages: never \(at message 0\)"):
        said("{{ raise_exception('never') }}", messages)
    with pytest.raises(CheckpointError, match="the chat template fails: ZeroDivisionError"):
        said("{{ 1 // 0 }}", messages)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part 0 is 'image_url'",
        ),
        ({"role": "user", "content": [7]}, "part 0 is 'int'"),
        ({"role": "user", "content": {"a": 1}}, "found dict"),
        ({"role": "user", "content": "a\ud83d"}, "half of a surrogate pair"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "needs a 'function' with a 'name'"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "should be a list"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "\udc00"}}]}, "surrogate"),
        ({"role": "user"}, "has no 'content'"),
    ],
)
def test_what_is_refused_names_the_message(message: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=rf"^message 1: .*{told}"):
        said(PLAIN, [{"role": "user", "content": "fine"}, message])


def test_a_surrogate_is_no_text_to_a_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for ask in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(DataError, match="half of a surrogate pair"):
            ask("a\ud83d b")
        with pytest.raises(DataError, match=r"expected a text, found"):
            ask(None)


def test_the_last_message_goes_on_as_in_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    tokenizer.config["chat_template"] = PLAIN
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, "}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    ours = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert ours.rstrip() == expected.rstrip() == "<user>Count.|<assistant>One, two,"
    assert tokenizer.decode(tokenizer.encode_chat(messages, continue_final_message=True)) == ours
    with pytest.raises(DataError, match="no message to continue"):
        tokenizer.apply_chat_template([], continue_final_message=True)
