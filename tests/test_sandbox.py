"""A template from a stranger renders as transformers would render it, or is stopped: soon, small, with its line."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import vocabularies

from luthier.errors import DataError, LuthierError, SpecError
from luthier.model import tiny
from luthier.text import sandbox

MESSAGES = [{"role": "user", "content": "canary"}, {"role": "assistant", "content": "yes"}]

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages.__class__.__base__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['sys'] }}",
    "{{ raise_exception.__code__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace.mro() }}",
    "{{ dict.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ config.items() }}",
    "{{ messages|attr('__class__') }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|map(attribute='__class__')|map(attribute='__base__')|list|string|length > 60 and 1/0 }}",
    "{{ ''|attr('form' ~ 'at')('x') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ [1]|map(f)|list }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].clear() }}",
    "{{ messages.sort() }}",
    "{% set ns = namespace(__class__=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import path %}",
    "{% extends '/etc/passwd' %}",
    "{{ 'x'.encode() }}",
    "{{ 'x'.translate({120: 'y'}) }}",
    "{{ (1).to_bytes(8, 'big') }}",
    "{{ (1.5).as_integer_ratio() }}",
    "{{ messages|pprint }}",
    "{{ messages|random }}",
    "{{ range }}",
    "{{ raise_exception }}",
    "{% macro m() %}{% endmacro %}{{ m }}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{{ loop.__init__ }}{% for x in [1] %}{{ loop._recurse.__globals__ }}{{ loop.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ caller.__globals__ }}{{ varargs.__class__ }}{% endfor %}",
]

BOMBS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% for b in range(100000) if b > 5 %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 200000 %}{% for b in 'x' * 200000 %}{% endfor %}{% endfor %}",
    "{% for a in [1] * 60000 %}{% for b in [1] * 60000 %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in range(100000)|map('string') %}{% for b in range(100000)|map('string') %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "{% for a in range(99999) %}{{ (range(99999)|list)[0] }}{% endfor %}",
    "{% for a in range(99999) %}{{ 'needle' in 'hay' * 60000 }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(90000)|sort(reverse=true)|first }}{% endfor %}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block b %}{{ self.b() }}{{ self.b() }}{% endblock %}",
    "{% macro f() %}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 15 + "x" * 9999 + "{% endcall %}" * 15 + "{% for a in range(99999) %}{% call f() %}x{% endcall %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(80) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(80) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(80) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(80) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(80) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x == n.x }}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(80) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x|tojson }}",
    "{% set n = namespace(x=['ab']) %}{% for i in range(80) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x|string }}",
    "{% set n = namespace(x=7) %}{% for i in range(80) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set x %}0123456789{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 60 * 'x' }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 9999999999) }}",
    "{{ ('{0}' * 20000).format('x' * 200000) }}",
    "{{ 'x'.center(10 ** 10) }}",
    "{{ 'x'|center(10 ** 10) }}",
    "{{ 'x'.zfill(10 ** 10) }}",
    "{{ 'x'|indent(10 ** 10) }}",
    "{{ ('\\n' * 200000)|indent(10 ** 6, true, true) }}",
    "{{ [1]|tojson(indent=10 ** 10) }}",
    "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "{{ [1]|slice(10 ** 10)|list }}",
    "{{ 1.5|round(10 ** 9) }}",
    "{{ ('a' * 200000).replace('a', 'b' * 200000) }}",
    "{{ ('a' * 200000)|replace('', 'b' * 200000) }}",
    "{{ ('b' * 200000).join('a' * 200000) }}",
    "{{ ('b' * 200000).join(range(99999)|map('string')) }}",
    "{{ range(99999)|join('b' * 200000) }}",
    "{{ range(99999)|map('string')|join(d='b' * 200000) }}",
    "{{ range(10 ** 9)|list }}",
    "{{ lipsum(n=10 ** 6) }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "x" * 300_000,
]  # fmt: skip


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Records every open and import while a template runs."""
    seen: list[Any] = []
    real_open, real_import = builtins.open, builtins.__import__
    monkeypatch.setattr(builtins, "open", lambda *a, **k: (seen.append(a), real_open(*a, **k))[1])
    monkeypatch.setattr("os.system", lambda *a: seen.append(a))
    monkeypatch.setattr("os.popen", lambda *a: seen.append(a))

    def importing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("os", "subprocess", "socket", "shutil"):
            seen.append(name)
        return real_import(name, *rest)

    sandbox.render("{{ 'warm'|upper }}", {})
    monkeypatch.setattr(builtins, "__import__", importing)
    yield seen


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_escape(source: str, watched: list[Any]) -> None:
    variables = {"messages": [dict(message) for message in MESSAGES]}
    try:
        text = sandbox.render(source, variables)
    except LuthierError:
        text = ""
    assert not watched
    assert variables == {"messages": MESSAGES}
    for leak in ("<class", "<function", "<module", "<bound", "object at", "builtin", "root:", "uid="):
        assert leak not in text


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_stopped_within_about_a_second(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(LuthierError):
        sandbox.render(source, {"messages": MESSAGES})
    assert time.thread_time() - started < 2.5  # about a second, on a shared machine


def test_honest_long_conversations_fit() -> None:
    """What is paid grows with what is given: 2,000 turns and two million characters are rendered."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(2000)]
    text = sandbox.render(tiny.CHAT_TEMPLATE, {"messages": messages, "add_generation_prompt": True})
    assert text.count("<|im_start|>") == 2002 and len(text) > 2_000_000


TEMPLATES = {
    "chatml": tiny.CHAT_TEMPLATE, "llama2": vocabularies.LLAMA2, "gemma": vocabularies.GEMMA,
    "qwen3": vocabularies.QWEN3, "glm": vocabularies.GLM,
    "helpers": "{% generation %}{{ messages|tojson(indent=2) }}{% endgeneration %}{{ tools|tojson }}"
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ loop.length }}{{ loop.last }}{{ (loop.nextitem or m).role }}{% endfor %}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|map(attribute='role')|join(', ') }}"
    "{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}{{ '<é&>'|tojson }}{{ 7 % 4 }}{{ 'x' ~ 3 ~ none ~ true }}"
    "{{ (messages|last).content|trim|upper|replace('A', 'b') }}{{ messages[0].items()|list }}{{ dict(a=1) }}"
    "{% macro f(x) %}[{{ x }}{{ caller() if caller else '' }}]{% endmacro %}{{ f('y') }}{% call f('z') %}c{% endcall %}"
    "{% set block %}b{{ 1.50 }}{% endset %}{{ block }}{{ missing }}{{ missing is defined }}{{ [1, [2]] }}{{ 'a,b'.split(',') }}"
    "{{ '{} and {b}'.format(1, b='c') }}{{ messages|length * 'ab' }}{{ 'a' in 'abc' }}{{ messages[::-1][0].role }}\n  {% if true %}\n  t\n  {% endif %}\n",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("cue", [False, True])
def test_text_equals_transformers(name: str, cue: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "look", "description": "é", "parameters": {}}}]
    chats = [
        MESSAGES[:1],
        MESSAGES,
        [{"role": "system", "content": " Be. "}, *MESSAGES, {"role": "user", "content": "more\n"}],
    ]
    for chat in chats:
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        theirs, _ = render_jinja_template(
            [chat], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=cue, **names
        )
        ours = sandbox.render(
            TEMPLATES[name], {**names, "messages": chat, "tools": tools, "add_generation_prompt": cue}
        )
        assert ours == theirs[0]


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("a\nb{% if %}", SpecError, r"t\.jinja:2.*not a valid Jinja template"),
        ("a\n\n{{ raise_exception('no ' ~ messages[0].role) }}", DataError, r"t\.jinja:3.*refuses this conversation: no user"),
        ("a\n{{ messages[0].content.nothing.more }}", DataError, r"t\.jinja:2.*cannot render"),
        ("a\n{{ 1 + 'a' }}", DataError, r"t\.jinja:2.*cannot render"),
        ("a\n\n{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}", SpecError, r"t\.jinja:3.*too long"),
    ],
)  # fmt: skip
def test_errors_name_the_line(source: str, kind: type[LuthierError], says: str) -> None:
    with pytest.raises(kind, match=says):
        sandbox.render(source, {"messages": MESSAGES}, name="t.jinja")


def test_the_date_is_fixed_unless_told() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert sandbox.render(source, {}) == "26 Jul 2024"
    assert sandbox.render(source, {}, today=date(2031, 1, 2)) == "02 Jan 2031"
