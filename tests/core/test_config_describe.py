"""Explaining the settings: to a reader, as JSON Schema, as the table in the docs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from fluentllm.core.config import load
from fluentllm.core.config.describe import as_tree, explain, markdown, schema
from fluentllm.core.config.tree import nearest, type_name
from fluentllm.core.errors import ConfigError
from fluentllm.core.plugins import PluginManager

ROOT = Path(__file__).parents[2]


class Acme(msgspec.Struct):
    speed: Annotated[float, msgspec.Meta(gt=0, description="How fast.", extra_json_schema={"unit": "m/s"})] = 1.5
    url: str | None = None


STRUCTS = {"acme": Acme}


def test_a_setting_is_explained_with_its_origin():
    loaded = load(None, {}, {"FLUENT_SCHEDULER__PREFILL_TOKENS": "64"})
    (row,) = explain("scheduler.prefill_tokens", loaded)
    assert (row.value, row.default, row.unit, row.type) == (64, None, "tokens", "int ≥ 16 or null")
    assert row.origin == "environment variable FLUENT_SCHEDULER__PREFILL_TOKENS"
    assert row.help
    (row,) = explain("server.port", loaded)
    assert row.origin == "default"


def test_a_section_is_all_of_its_settings():
    loaded = load(None, {"plugins.acme.speed": 9}, {}, structs=STRUCTS)
    assert [row.key for row in explain("plugins", loaded)] == [
        "plugins.allow",
        "plugins.deny",
        "plugins.acme.speed",
        "plugins.acme.url",
    ]
    assert explain("plugins.acme.speed", loaded)[0].value == 9.0


def test_an_unknown_key_has_a_neighbour():
    with pytest.raises(ConfigError, match=r"no setting 'server.prot'. Did you mean server.port\?"):
        explain("server.prot", load(None, {}, {}))


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("port", "server.port"),
        ("servr.memory", "kv.memory"),
        ("scheduler.polcy", "scheduler.policy"),
        ("zzzz", None),
        ("plugins.spec_pld.least", None),  # like many keys of other plugins, and none of its own
    ],
)
def test_the_nearest_key(wrong, meant):
    assert nearest(wrong, [row.key for row in explain("", load(None, {}, {}))]) == meant


def test_every_setting_has_help():
    rows = explain("", load(None, {}, {}, structs=PluginManager.load(None).config_structs()))
    assert len(rows) > 30
    assert [row.key for row in rows if not row.help] == []


def test_the_tree_reads_back_as_a_file(tmp_path):
    loaded = load(None, {"server.port": 9, "plugins.acme.speed": 2, "plugins.deny": ["x"]}, {}, structs=STRUCTS)
    file = tmp_path / "all.json"
    file.write_text(json.dumps(as_tree(loaded.settings)))
    assert load(file, {}, {}, structs=STRUCTS).settings == loaded.settings


def test_the_schema_has_types_bounds_units_and_plugins():
    document = schema(STRUCTS)
    definitions = document["$defs"]
    assert "plugin" not in document["properties"]
    assert document["additionalProperties"] is False
    port = definitions["ServerSettings"]["properties"]["port"]
    assert (port["type"], port["minimum"], port["maximum"], port["default"]) == ("integer", 0, 65535, 8000)
    assert definitions["SchedulerSettings"]["properties"]["prefill_tokens"]["unit"] == "tokens"
    assert definitions["PluginSettings"]["properties"]["acme"] == {"$ref": "#/$defs/Acme"}
    assert definitions["Acme"]["properties"]["speed"]["unit"] == "m/s"
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (int, "int"),
        (int | None, "int or null"),
        (Annotated[int, msgspec.Meta(ge=1, lt=9)], "int ≥ 1, < 9"),
        (Annotated[Annotated[int, msgspec.Meta(ge=8)] | None, msgspec.Meta(description="x")], "int ≥ 8 or null"),
        (Literal["a", "b"], "one of a, b"),
        (list[str], "list of str"),
        (dict[str, int], "mapping of str to int"),
    ],
)
def test_types_read_like_words(annotation, name):
    assert type_name(annotation) == name


def test_the_docs_have_every_setting():
    """Renew the generated part of the page with `UPDATE_DOCS=1 pytest tests/core/test_config_describe.py`."""
    page = ROOT / "docs" / "configuration.md"
    text, mark, table = page.read_text(encoding="utf-8").partition("<!-- generated from here on -->\n")
    expected = "\n" + markdown(PluginManager.load(None).config_structs())
    if os.environ.get("UPDATE_DOCS") == "1":
        page.write_text(text + mark + expected, encoding="utf-8")
    else:
        assert table == expected
