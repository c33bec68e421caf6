"""Tools: always valid calls, the same whole and streamed; and the parser, letter by letter."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
from typing import Any

import pytest
from serving import CONTEXT, Running, running, served_mixture, start

from octad.engine.params import StructuredOutput
from octad.errors import DataError
from octad.serve.call_parsers import CallDelta, CallParser
from octad.serve.messages import _toolbox
from octad.serve.protocol import MessagesRequest
from octad.serve.replies import ApiError
from octad.serve.tool_calls import Toolbox
from octad.text.chat_template import calls_are_json, render_chat

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "how": {"type": "string", "enum": ["fast", 'sl"ow}']},
            },
            "required": ["a", "how"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
BODY = {"model": "mixture", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "seed": 1}


def joined(chunks: Any) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Content, calls and finish reasons of a stream."""
    text, calls, reasons = "", [], []
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            assert choice.delta.tool_calls is None or choice.delta.tool_calls  # never an empty list
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.function.name
                    calls.append({"name": call.function.name, "arguments": ""})
                else:
                    assert call.function.name is None
                calls[call.index]["arguments"] += call.function.arguments or ""
    return text, calls, reasons


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "add"}},
        {"type": "function", "function": {"name": "now"}},
    ],
)
def test_forced_calls(running: Running, choice: Any) -> None:
    body = BODY | {"tools": [ADD, NOW], "tool_choice": choice}
    client = running.openai()
    whole = client.chat.completions.create(**body).choices[0]
    (call,) = whole.message.tool_calls or []
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    arguments = json.loads(call.function.arguments)
    if call.function.name == "add":
        assert 0 <= arguments["a"] <= 99
        assert arguments["how"] in ("fast", 'sl"ow}')
    else:
        assert arguments == {}
    if isinstance(choice, dict):
        assert call.function.name == choice["function"]["name"]
    text, calls, reasons = joined(client.chat.completions.create(**body, stream=True))
    assert (text, reasons) == ("", ["tool_calls"])
    assert calls == [{"name": call.function.name, "arguments": call.function.arguments}]


def test_several_calls_where_asked_for(running: Running) -> None:
    body = BODY | {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": True, "max_tokens": 2000}
    calls = running.openai().chat.completions.create(**body).choices[0].message.tool_calls or []
    assert 1 <= len(calls) <= 8
    assert all(0 <= json.loads(call.function.arguments)["a"] <= 99 for call in calls)
    assert len({call.id for call in calls}) == len(calls)


def test_a_call_that_is_cut_off(running: Running) -> None:
    for tokens in (5, 24, 45, 52):
        body = BODY | {"tools": [ADD], "tool_choice": "required", "max_tokens": tokens}
        whole = running.openai().chat.completions.create(**body).choices[0]
        assert whole.finish_reason == "length"
        assert whole.message.tool_calls is None or len(whole.message.tool_calls) == 1
        text, calls, reasons = joined(running.openai().chat.completions.create(**body, stream=True))
        assert (text, reasons) == (whole.message.content or "", ["length"])
        assert [c["arguments"] for c in calls] == [
            c.function.arguments for c in whole.message.tool_calls or []
        ]


def test_auto_leaves_text_alone(running: Running) -> None:
    """A model that does not call says what it says without tools in its grammar."""
    body = BODY | {"tools": [ADD], "max_tokens": 20}
    whole = running.openai().chat.completions.create(**body).choices[0]
    assert whole.message.tool_calls is None
    assert whole.finish_reason == "length"
    assert joined(running.openai().chat.completions.create(**body, stream=True))[0] == whole.message.content
    none = running.openai().chat.completions.create(**body | {"tool_choice": "none"}).choices[0]
    assert none.message.tool_calls is None


def test_what_begins_as_a_call_goes_on_as_one(running: Running) -> None:
    """The grammar of `auto`, fed by hand: after the mark only a tool's name may come."""
    tools = Toolbox.of([ADD], "auto", None)
    matcher = running.llm.engine.grammars.compile(StructuredOutput(grammar=tools.grammar()))
    core = matcher._core
    encode = running.llm.tokenizer.encode
    assert core.try_consume_tokens(encode("Well. <tool_call>", parse_special=False)) == 17
    assert core.try_consume_tokens(encode("no", parse_special=False)) == 0
    rest = encode('{"name": "add", "arguments": {"a":5,"how":"fast"}}</tool_call> done', parse_special=False)
    assert core.try_consume_tokens(rest) == len(rest)
    assert not core.is_error()


def test_no_second_call_where_one_is_allowed(running: Running) -> None:
    """parallel_tool_calls: false and Anthropic's disable_parallel_tool_use, in the grammar, fed by hand."""
    encode = running.llm.tokenizer.encode
    one = encode('Well. <tool_call>{"name": "now", "arguments": {}}</tool_call>', parse_special=False)
    for parallel, more in ((False, 0), (None, 1), (True, 1)):
        grammar = Toolbox.of([NOW], "auto", parallel).grammar()
        core = running.llm.engine.grammars.compile(StructuredOutput(grammar=grammar))._core
        assert core.try_consume_tokens(one) == len(one)
        assert core.try_consume_tokens(encode("<", parse_special=False)) == more
    asked = MessagesRequest.model_validate(
        {
            "messages": [],
            "tools": [{"name": "f"}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        }
    )
    assert _toolbox(asked).parallel is False


def test_patterns_that_look_around_are_left_to_the_tool(running: Running) -> None:
    tool = json.loads(json.dumps(ADD))
    tool["function"]["parameters"]["properties"]["how"] = {
        "type": "string",
        "pattern": "^(?!x).*$",
        "maxLength": 5,
    }
    body = BODY | {"tools": [tool], "tool_choice": "required"}
    assert running.openai().chat.completions.create(**body).choices[0].message.tool_calls


def test_conversations_with_calls(running: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    assert running.openai().chat.completions.create(**BODY | {"messages": messages, "max_tokens": 4}).choices
    told = running.post("/tokenize", {"messages": messages, "tools": [ADD]}).json()["tokens"]
    text = running.llm.tokenizer.decode(told)
    assert '"name": "add", "description": "Adds."' in text
    assert '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in text
    assert "<tool_response>2</tool_response>" in text


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "no good"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]},
        {"tools": [ADD], "tool_choice": "sometimes"},
        {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": "required"},
    ],
)
def test_tools_that_make_no_sense(running: Running, change: dict[str, Any]) -> None:
    response = running.post("/v1/chat/completions", BODY | change)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("tools", "tool_choice")


SAID = [
    ("plain text", "plain text", []),
    ('<tool_call>{"name": "add", "arguments": {"a": "}\\"{"}}</tool_call>', "", [("add", '{"a": "}\\"{"}')]),
    ('Sure. <tool_call>\n{"name":"now"}\n</tool_call>', "Sure. ", [("now", "{}")]),
    (
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>\n',
        "",
        [("add", "{}"), ("now", "[1]")],
    ),
    ("a <tool_cal b", "a <tool_cal b", []),
    ("<tool_call>nonsense</tool_call> x", "<tool_call>nonsense</tool_call> x", []),
    (
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [],
    ),
    ("<tool_call>{", "<tool_call>{", []),
    ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [("add", '{"a": 1')]),
]


@pytest.mark.parametrize(("said", "text", "calls"), SAID)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_calls_in_any_pieces(said: str, text: str, calls: list[tuple[str, str]], size: int) -> None:
    parser = CallParser(["add", "now"])
    found = [p for at in range(0, len(said), size) for p in parser.push(said[at : at + size])] + list(
        parser.finish()
    )
    assert "".join(p for p in found if isinstance(p, str)) == text
    deltas = [p for p in found if isinstance(p, CallDelta)]
    names = [d.name for d in deltas if d.name]
    arguments = ["".join(d.arguments for d in deltas if d.index == i) for i in range(len(names))]
    assert list(zip(names, arguments, strict=True)) == calls
    assert [d.id is not None for d in deltas] == [d.name is not None for d in deltas]


def test_choices() -> None:
    assert Toolbox.of(None, "auto", None).choice == "none"
    assert Toolbox.of([ADD], None, None).choice == "auto"
    assert Toolbox.of([ADD], "none", None).definitions == ()
    assert Toolbox.of([ADD, NOW], {"type": "function", "name": "now"}, None).names == ("now",)
    with pytest.raises(ApiError, match="there are no tools"):
        Toolbox.of([], {"type": "function", "function": {"name": "x"}}, None)


LLAMA = (
    "{% if tools %}{{ raise_exception('native tools') }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{{ '<|python_tag|>' if false }}"
)
FORMS = {
    "llama": LLAMA,
    "mistral": LLAMA.replace("<|python_tag|>", "[TOOL_CALLS]"),
    "qwen coder": LLAMA.replace("<|python_tag|>", "<tool_call>\\n<function=name>"),
}


@pytest.mark.parametrize("form", FORMS)
def test_templates_that_teach_another_form(form: str) -> None:
    """Tools are told in a system text, and earlier calls in the one form that is understood."""
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
        },
        {"role": "tool", "content": "4"},
    ]
    assert not calls_are_json(FORMS[form])
    text = render_chat(FORMS[form], messages, {"tools": [ADD], "calls_as_json": True}, "m")
    assert '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>' in text
    assert "<tool_response>4</tool_response>" in text
    assert text.startswith("<system>You may call functions.")
    with pytest.raises(DataError, match="native tools"):  # everybody else gets what the template teaches
        render_chat(FORMS[form], messages, {"tools": [ADD]}, "m")
    taught = "{% for t in tools %}{{ t.function.name }} <tool_call>{% endfor %}"
    assert (
        render_chat(taught, messages[:1], {"tools": [ADD], "calls_as_json": True}, "m") == "add <tool_call>"
    )


def test_numbers_of_calls_have_an_end(running: Running) -> None:
    """A random model would go on with digits for ever; so would a small one that was trained."""
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "x": {"type": "number"}},
        "required": ["n", "x"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    body = BODY | {"tools": tools, "tool_choice": "required", "temperature": 0}
    call = running.post("/v1/chat/completions", body).json()["choices"][0]["message"]["tool_calls"][0]
    found = json.loads(call["function"]["arguments"])
    assert abs(found["n"]) <= 2**53
    assert abs(found["x"]) <= 1e15


def test_a_name_that_is_no_json_is_text() -> None:
    parser = CallParser(["add"])
    said = '<tool_call>{"name": "a\\qd", "arguments": {}}</tool_call>'
    assert "".join(str(part) for part in [*parser.push(said), *parser.finish()]) == said
    assert parser.calls == 0
