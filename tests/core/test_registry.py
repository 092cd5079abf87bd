"""Choosing among what plugins offer."""

from __future__ import annotations

import sys

import pytest

from fluentllm.core.errors import ConfigError, PluginError
from fluentllm.core.plugins.registry import Entry, Registry


def small_only(spec: int) -> str | None:
    return None if spec < 10 else f"{spec} is not below 10"


def broken(spec: int) -> str | None:
    raise KeyError("head_dim")


@pytest.fixture
def registry() -> Registry:
    registry = Registry("attention", "attention backend", "attention.backend")
    registry.add(Entry("small", dict, "plugin_a", "plugin 'a'", small_only))
    registry.add(Entry("any", list, "plugin_b", "plugin 'b'"))
    registry.add(Entry("broken", set, "plugin_c", "plugin 'c'", broken))
    return registry


def test_choose_by_name(registry):
    assert registry.get("small").factory is dict
    assert registry.names() == ["any", "broken", "small"]
    assert "small" in registry
    assert len(registry) == 3


def test_auto_asks_who_supports_the_spec(registry):
    assert [entry.name for entry in registry.supported(3)] == ["any", "small"]
    assert [entry.name for entry in registry.supported(30)] == ["any"]
    assert registry.why_not(30) == {"small": "30 is not below 10", "broken": "its supports() raised KeyError: 'head_dim'"}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: sys.exit(2), "its supports() raised SystemExit: 2"),
        (lambda: True, "its supports() gave True, neither None nor the reason why not"),
        (lambda: ["no"], "its supports() gave ['no'], neither None nor the reason why not"),
        (lambda: None, None),
    ],
)
def test_what_supports_may_say(answer, why):
    assert Entry("odd", dict, "plugin_d", "plugin 'd'", lambda spec: answer()).reason_against(3) == why


def test_an_unknown_name_says_what_there_is(registry):
    with pytest.raises(ConfigError) as error:
        registry.get("smal")
    assert error.value.message == "No plugin offers the attention backend 'smal'; there are: any, broken, small."
    assert error.value.fix.startswith("Did you mean 'small'? Set `attention.backend`")
    assert error.value.param == "attention.backend"


def test_a_named_entry_must_support_the_spec(registry):
    assert registry.require("small", 3).name == "small"
    with pytest.raises(ConfigError, match="'small' cannot be used here: 30 is not below 10") as error:
        registry.require("small", 30)
    assert error.value.fix == "Choose one that can: any."


@pytest.mark.parametrize("name", ["", "auto", 3])
def test_names_must_be_usable_in_a_config(registry, name):
    with pytest.raises(PluginError, match="plugin 'd' offers"):
        registry.add(Entry(name, dict, "plugin_d", "plugin 'd'"))


def test_a_factory_must_be_callable(registry):
    with pytest.raises(PluginError, match="cannot be called"):
        registry.add(Entry("seven", 7, "plugin_d", "plugin 'd'"))


def test_names_clash(registry):
    with pytest.raises(PluginError, match="'small': plugin 'a' and plugin 'd'"):
        registry.add(Entry("small", dict, "plugin_d", "plugin 'd'"))
    registry.remove_plugin("plugin_a")
    registry.add(Entry("small", dict, "plugin_d", "plugin 'd'"))
    assert registry.get("small").plugin == "plugin_d"


def test_one_plugin_that_offers_a_name_twice(registry):
    with pytest.raises(PluginError, match=r"^plugin 'a' offers the attention backend 'small' twice\. Register it once\.$"):
        registry.add(Entry("small", dict, "plugin_a", "plugin 'a'"))
