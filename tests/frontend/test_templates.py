"""Chat templates: rendered as Transformers renders them, and kept in bounds."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Any

import pytest

from fluentllm.core.errors import CheckpointError, InvalidRequest
from fluentllm.frontend import templates
from fluentllm.frontend.templates import ChatTemplate

from .checkpoints import CHATML

MESSAGES = [
    {"role": "system", "content": 'Be brief; say "yes" & <no>.'},
    {"role": "user", "content": "  Was heißt 'ja'?\n"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "你好"},
]
LLAMA_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('Only user and assistant: ' + message.role) }}
    {%- endif %}
    {%- if loop.index0 > 50 %}{% break %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
NAMESPACES = """{% set ns = namespace(first=true, system='') %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] %}
    {% endif %}
{% endfor %}
{{ ns.system }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': 1, 'a': 'é<'} | tojson(sort_keys=true) }}
{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}{{ message.content }}{% continue %}{% endif %}{% endfor %}{% if tools %}tools{% endif %}
{{ strftime_now('%Y') }}
"""


TOOLS = [{"type": "function", "function": {"name": "f", "description": "Says é.", "parameters": {"type": "object"}}}]
WITH_TOOLS = """{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson }} {{ tool.function | tojson(indent=4) }}
    {%- endfor %}
{%- else %}
    {{- "none" }}
{%- endif %}
{%- for message in messages %}{{- message.content }}{%- endfor %}
"""


@pytest.mark.parametrize("tools", [TOOLS, [], None])
def test_renders_tools_as_transformers_does(tools: list[dict[str, Any]] | None) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    [expected], _ = utils.render_jinja_template([MESSAGES], chat_template=WITH_TOOLS, tools=tools or None, documents=None)
    assert ChatTemplate(WITH_TOOLS).render(MESSAGES, tools=tools) == expected
    assert expected.startswith("none") == (not tools)


@pytest.mark.parametrize(
    ("source", "knows"),
    [
        (WITH_TOOLS, True),
        ("{% if tools %}{{ tools }}{% endif %}", True),
        ("{{ 'tools' }} tools", False),
        ("{% for m in messages %}{{ m.tools }}{% endfor %}", False),
        ("{% set tools = 1 %}{{ tools }}", False),
    ],
)
def test_knows_whether_a_template_reads_tools(source: str, knows: bool) -> None:
    assert ChatTemplate(source).knows_tools is knows
    assert "tools" not in ChatTemplate(source).variables


@pytest.mark.parametrize("source", [CHATML, LLAMA_LIKE, NAMESPACES], ids=["chatml", "llama", "namespaces"])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    [expected], _ = utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=prompt, tools=None, documents=None, **special
    )
    assert ChatTemplate(source, special).render(MESSAGES, add_generation_prompt=prompt) == expected


def test_a_request_may_set_what_the_template_reads_and_nothing_else() -> None:
    source = """{{ bos_token }}{{ strftime_now('%Y')[:0] }}{% for m in messages %}{% endfor %}
{%- if think is defined and not think %}no{% endif %}"""
    thinking = ChatTemplate(source, {"bos_token": "<s>"})
    assert thinking.variables == {"think"}
    assert thinking.render([]) == "<s>"
    assert thinking.render([], variables={"think": False}) == "<s>no"
    for name in ("thinks", "bos_token", "messages", "strftime_now", "m"):
        with pytest.raises(InvalidRequest, match=f"no variable '{name}' to set. It has: think.") as caught:
            thinking.render([], variables={name: 1})
        assert caught.value.param == f"chat_template_kwargs.{name}"


def test_the_date_is_todays() -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([]) == datetime.now().strftime("%d %b %Y")


def test_what_a_template_refuses_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequest, match="Only user and assistant: tool"):
        ChatTemplate(LLAMA_LIKE).render([{"role": "tool", "content": "x"}])
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        ChatTemplate(CHATML).render([{"role": "user", "content": None}])


def test_a_template_that_is_no_jinja_is_the_checkpoints_error() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("ok\n{% for %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages|attr('__class__')).mro() }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{{ self._TemplateReference__context.environment.from_string('x') }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    try:
        text = ChatTemplate(source).render(messages)
    except InvalidRequest:
        text = ""
    assert not re.search(r"class|module|root|uid=", text)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10 ** 10 ** 8 }}",
        "{{ [0] * (10 ** 9) }}",
        "{{ ('x' * 999999) * 999999 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_bounds(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_CHARACTERS", 100_000)
    started = time.monotonic()
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render([])
    assert time.monotonic() - started < 5


def test_a_slow_template_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.05)
    with pytest.raises(InvalidRequest, match="longer than"):
        ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}").render([])


def test_what_a_template_knows() -> None:
    assert not ChatTemplate(CHATML).knows_tool_calls
    assert not ChatTemplate(CHATML).knows_names
    assert ChatTemplate("{% if message.tool_calls %}{{ message['name'] }}{% endif %}").knows_tool_calls
    assert ChatTemplate("{{ message['name'] }}").knows_names
    assert not ChatTemplate("{{ tool.name }}").knows_names
    assert ChatTemplate("{{ 'developer' }}").knows_developer
