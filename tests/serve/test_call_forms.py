"""The forms in which models were taught to call tools: which one a template teaches, its grammar, its parser."""

# ruff: noqa: F401, F811 (fixtures are imported)

import json
from pathlib import Path
from typing import Any

import pytest
from members import save_tokenizer
from serving import CONTEXT, Running, Start, running, served_mixture, start
from tiny_models import TinyCheckpoint

from octad.engine.params import StructuredOutput
from octad.serve.call_forms import CallForm
from octad.serve.call_parsers import CallDelta, mistral_id
from octad.text.tokenizer import Tokenizer

ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 99},
                "note": {"type": "string", "maxLength": 9},
                "how": {"type": "string", "enum": ["fast", 'sl"ow']},
            },
            "required": ["a", "how"],
        },
    },
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [ADD, NOW]
HISTORY = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}CALL{% endfor %}{% endif %}\n{% endfor %}<assistant>"
)
TEMPLATES = {  # as much of the public ones as tells the form
    "json": HISTORY.replace("CALL", '<tool_call>{"name": "{{ c.function.name }}"}</tool_call>'),
    "bare": HISTORY.replace("CALL", '{"name": "{{ c.function.name }}", "parameters": {} }<|python_tag|>'),
    "mistral": HISTORY.replace("CALL", "[TOOL_CALLS] [{{ c.function | tojson }}]{{ c.id }}"),
    "mistral args": HISTORY.replace("CALL", "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.id }}"),
    "tags": HISTORY.replace("CALL", "<tool_call>\n<function={{ c.function.name }}>\n</function>"),
}
SIGNS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
A, B = '{"a":7,"how":"sl\\"ow"}', "{}"  # as the grammar has it, without spaces
SAID = {
    "json": [
        f'<tool_call>{{"name": "add", "arguments": {A}}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>',
    ],
    "bare": [f'{{"name": "add", "parameters": {A}}}', '; {"name": "now", "parameters": {}}'],
    "mistral": [f'[TOOL_CALLS] [{{"name": "add", "arguments": {A}}}', ', {"name": "now", "arguments": {}}]'],
    "mistral args": [f"[TOOL_CALLS]add[ARGS]{A}", "[TOOL_CALLS]now[ARGS]{}"],
    "tags": [
        '<tool_call>\n<function=add>\n<parameter=a>\n7\n</parameter>\n<parameter=how>\nsl"ow\n</parameter>\n'
        "</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ],
}


def tokenizer(directory: Path, template: str, special: bool) -> Tokenizer:
    """A token a byte; the forms' control words are tokens of their own, or letters."""
    save_tokenizer(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    found = Tokenizer.from_directory(directory)
    if special:
        found.core.add_special_tokens(list(SIGNS))
    return found


def read(form: CallForm, said: str, size: int) -> tuple[str, list[tuple[str, str]]]:
    """Text and calls of an answer that comes in pieces of so many letters."""
    parser = form.parser(TOOLS)
    found = [p for at in range(0, len(said), size) for p in parser.push(said[at : at + size])]
    found += list(parser.finish())
    deltas = [p for p in found if isinstance(p, CallDelta)]
    names = [d.name for d in deltas if d.name]
    assert [d.id is not None for d in deltas] == [d.name is not None for d in deltas]
    joined = ["".join(d.arguments for d in deltas if d.index == i) for i in range(len(names))]
    return "".join(p for p in found if isinstance(p, str)), list(zip(map(str, names), joined, strict=True))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_a_template_teaches(tmp_path: Path, kind: str, special: bool) -> None:
    form = CallForm.of(tokenizer(tmp_path, TEMPLATES[kind], special))
    assert (form.kind, form.native) == (kind, True)
    assert form.hidden == (special and kind not in ("json", "tags"))
    save_tokenizer(tmp_path)
    assert not CallForm.of(Tokenizer.from_directory(tmp_path)).native


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("kind", SAID)
def test_calls_in_any_pieces(tmp_path: Path, kind: str, size: int) -> None:
    form = CallForm.of(tokenizer(tmp_path, TEMPLATES[kind], special=True))
    whole = "".join(SAID[kind])
    add = A.replace(":", ": ").replace(",", ", ") if kind == "tags" else A
    assert read(form, whole, size) == ("", [("add", add), ("now", B)])
    before = "" if kind == "bare" else "Sure. "
    assert read(form, before + SAID[kind][0], size) == (before, [("add", add)])
    for text in ("plain", "[TOOL_CALL", "<tool", "{ x", '{"nam', "a\n[b] {c}", "<|python"):
        assert read(form, text, size) == (text, [])


def test_what_models_also_write(tmp_path: Path) -> None:
    """Ids within Mistral's lists, Llama's tag, tags without line ends, a call that is cut, names that nobody has."""
    forms = {kind: CallForm.of(tokenizer(tmp_path, text, special=True)) for kind, text in TEMPLATES.items()}
    listed = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "now"}]'
    assert read(forms["mistral"], listed, 2) == ("", [("add", '{"a": 1}'), ("now", "{}")])
    assert read(forms["bare"], '<|python_tag|>{"name": "now", "parameters": {}}', 2) == ("", [("now", "{}")])
    tags = "<tool_call><function=add><parameter=note>a\nb</parameter><parameter=a>[1, 2]</parameter>"
    tags += "</function></tool_call>"
    assert read(forms["tags"], tags, 2) == ("", [("add", '{"note": "a\\nb", "a": [1, 2]}')])
    odd = "<tool_call><function=add><parameter=b>not json</parameter></function></tool_call>"
    assert read(forms["tags"], odd, 1) == ("", [("add", '{"b": "not json"}')])
    assert read(forms["bare"], '{"name": "add", "parameters": {"a": 1', 5) == ("", [("add", '{"a": 1')])
    for kind, said in (
        ("mistral", '[TOOL_CALLS][{"name": "other", "arguments": {}}]'),
        ("mistral args", "[TOOL_CALLS]other[ARGS]{}"),
        ("bare", '{"name": "other", "parameters": {}}'),
        ("tags", "<tool_call>\n<function=other>\n</function>\n</tool_call>"),
    ):
        assert read(forms[kind], said, 3) == (said, [])


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", SAID)
def test_grammars_take_calls_and_nothing_like_them(tmp_path: Path, kind: str, special: bool) -> None:
    llguidance = pytest.importorskip("llguidance")
    core = tokenizer(tmp_path, TEMPLATES[kind], special)
    form = CallForm.of(core)
    from octad.engine.structured import GrammarCompiler

    compiler = GrammarCompiler(core, core.eos_ids)

    def taken(said: str, **options: Any) -> tuple[bool, bool]:
        """Whether all of it is taken, and whether the answer may end there."""
        grammar = form.grammar(TOOLS, **options)
        matcher = compiler.compile(StructuredOutput(grammar=grammar))
        ids = core.encode(said)
        return matcher._core.try_consume_tokens(ids) == len(ids), matcher.complete

    first, both = SAID[kind][0] + ("]" if kind == "mistral" else ""), "".join(SAID[kind])
    both = both.replace("</tool_call><tool_call>", "</tool_call>\n<tool_call>")
    assert taken(first, forced=True) == (True, True)
    assert taken(both, forced=True, parallel=True) == (True, True)
    assert taken(both, forced=True)[0] is False
    assert taken("Sure", forced=True)[0] is False
    assert taken(first.replace("7", "700"), forced=True)[0] is False
    assert taken(first.replace("add", "sub"), forced=True)[0] is False
    assert taken(first, forced=False) == taken("Sure. {x}", forced=False) == (True, True)
    assert taken(first.replace("7", "x"), forced=False)[0] is False  # what begins so must go on so
    assert taken(both, forced=False, parallel=False)[0] is False
    assert taken('{"n": 1}', forced=False, schema='{"type": "object"}')[0]
    assert taken(first, forced=False, schema='{"type": "object"}') == (True, True)
    assert llguidance


@pytest.mark.parametrize("kind", ["mistral", "bare", "tags"])
def test_a_server_of_such_a_model(
    start: Start, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, kind: str
) -> None:
    """The template tells the tools; forced calls are valid and the same whole and streamed; ids come back as it wants."""
    import shutil

    source = tiny_checkpoint("mixtral", vocab_size=264, max_position_embeddings=CONTEXT)
    directory = tmp_path / "mixture"
    shutil.copytree(source, directory)
    tokenizer(directory, TEMPLATES[kind], special=True).save(directory)
    running = start(model=directory)
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": TOOLS,
        "max_tokens": 4000,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "seed": 3,
    }
    whole = running.post("/v1/chat/completions", body).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    found = json.loads(call["function"]["arguments"])
    assert whole["finish_reason"] == "tool_calls"
    assert 0 <= found["a"] <= 99
    assert found["how"] in ("fast", 'sl"ow')
    pieces = ""
    for chunk in running.openai().chat.completions.create(model="mixture", stream=True, **body):  # type: ignore[call-overload]
        for part in chunk.choices[0].delta.tool_calls or []:
            pieces += part.function.arguments or ""
    assert json.loads(pieces) == found
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call | {"id": "call_of_another_server"}]},
        {"role": "tool", "tool_call_id": "call_of_another_server", "content": "2"},
    ]
    told = running.post("/tokenize", {"messages": chat, "tools": TOOLS}).json()["tokens"]
    text = running.llm.tokenizer.decode(told, skip_special_tokens=False)
    assert text.startswith("[add][now]<user>Hi")
    assert "You may call functions" not in text
    assert (mistral_id("call_of_another_server") in text) == (kind == "mistral")


def test_ids_of_nine_letters() -> None:
    assert mistral_id("abcDEF123") == "abcDEF123"
    assert len(mistral_id("call_x")) == 9
    assert mistral_id("call_x") == mistral_id("call_x") != mistral_id("call_y")
    assert mistral_id("call_ä-1").isalnum()
