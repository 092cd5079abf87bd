"""Which answer format a model has: the setting's, or the one that its chat template shows."""

from __future__ import annotations

import pytest

from fluentllm.core import config
from fluentllm.core.errors import ConfigError
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AnswerFormat
from fluentllm.frontend.services import load_answer_format
from fluentllm.frontend.templates import ChatTemplate

FORMATS = PluginManager.load({"frontend"}, allow=[]).registry("answer_formats")
SHOWS = {
    "hermes": "<tool_call>{{ x }}</tool_call>",
    "longcat": "<longcat_tool_call>",
    "llama3_json": """<|start_header_id|>{{ '{"name": function name, "parameters": dictionary}' }}""",
    "mistral": "{{ '[TOOL_CALLS] [' }}",
    "deepseek_v3": "{{ '<｜tool▁calls▁begin｜>' }}",
}
OTHERS = ["", "{{ messages }}", "<tool_call>{{ x }}<arg_key>", "<tool_call><function={{ x }}>", "<|start_header_id|>"]


def loaded(template: str | None, name: str = "auto") -> AnswerFormat | None:
    settings = config.load(None, {"model.answer_format": name}, {}).settings
    return load_answer_format(settings, None if template is None else ChatTemplate(template), FORMATS)


def test_auto_looks_at_the_template() -> None:
    assert set(SHOWS) == set(FORMATS.names())
    for name, template in SHOWS.items():
        found = loaded(template)
        assert found is not None
        assert found.markers == FORMATS.get(name).factory("").markers
        assert [entry.name for entry in FORMATS.supported(template)] == [name]
    for template in (None, *OTHERS):
        assert loaded(template) is None


def test_the_setting_names_one() -> None:
    found = loaded(None, "mistral")
    assert found is not None
    assert "[TOOL_CALLS]" in found.markers
    assert loaded(SHOWS["hermes"], "none") is None
    with pytest.raises(ConfigError, match=r"'hermess'.*deepseek_v3, hermes, llama3_json, longcat, mistral.*Did you mean"):
        loaded(SHOWS["hermes"], "hermess")
