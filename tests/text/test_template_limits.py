"""Templates without an end come to one, in one line; ordinary ones mean what Jinja's own sandbox makes of them."""

import time

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octad.errors import OctadError
from octad.text.chat_template import render_chat
from octad.text.template_limits import BoundedEnvironment

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
ORDINARY = [
    "{% for m in messages %}{{ loop.index0 ~ '/' ~ loop.length }}{{ m.role + ': ' + m['content'] }}"
    "{{ '\n' if not loop.last }}{% endfor %}",
    "{% macro say(m, end='.') %}<{{ m.role }}>{{ m.content|trim }}{{ end }}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1], '!') %}?{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% else %}none"
    "{% endfor %}{{ ns.n * 3 }} {{ 2 ** 10 }} {{ '%s-%05d' % ('a', 7) }} {{ '=' * 9 }}",
    "{% for m in [[1, [2, 3]], 4] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_ordinary_templates_are_as_they_were(template: str) -> None:
    environment = BoundedEnvironment()
    with environment.limited():
        ours = environment.from_string(template).render(messages=CHAT)
    assert ours == ImmutableSandboxedEnvironment().from_string(template).render(messages=CHAT)


ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}y{% endfor %}{% endfor %}{% endset %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'x' * (10 ** 12) }}",
    "{{ [1] * 10 ** 11 }}",
    "{{ '%999999999999d' % 1 }}",
    "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{{ lipsum(n=10 ** 9) }}",
    "x" * (2 << 20),
]


@pytest.mark.parametrize("template", ENDLESS, ids=lambda t: t[:40])
def test_endless_ones_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octad.text.template_limits.SECONDS", 0.2)
    before = time.thread_time()
    with pytest.raises(OctadError, match="chat template") as caught:
        render_chat(template, CHAT, {}, "model")
    assert time.thread_time() - before < 10
    assert "\n" not in str(caught.value)
