"""Settings from one file, the environment and the command line, and what is said when something is wrong."""

from __future__ import annotations

import os
import textwrap
from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given, strategies as st

from fluentllm.core.config import bind, from_json, load, to_json
from fluentllm.core.errors import ConfigError
from fluentllm.core.settings import Settings


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "serve.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


class Odd(msgspec.Struct):
    k: int | Literal["auto"] = "auto"
    switch: Literal["on", "off"] = "on"
    maybe: Literal["a"] | None = "a"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("k", "2", 2), ("k", "auto", "auto"), ("switch", "off", "off"), ("maybe", "null", None), ("maybe", "a", "a")],
)
def test_words_and_numbers_in_one_setting(key, text, value):
    settings = load(None, {f"plugins.odd.{key}": text}, {}, structs={"odd": Odd}).settings
    assert getattr(settings.plugin["odd"], key) == value


def test_a_wrong_word_is_refused():
    text = mistakes(None, {"plugins.odd.k": "many"}, {}, structs={"odd": Odd})
    assert "plugins.odd.k is 'many': Invalid enum value 'many'. Give int or one of auto." in text


def mistakes(*args, **options) -> str:
    with pytest.raises(ConfigError) as error:
        load(*args, **options)
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------- precedence
def test_nothing_given_is_all_defaults():
    loaded = load(None, {}, {})
    assert loaded.settings == Settings()
    assert loaded.origins == {}


def test_the_later_source_wins_and_is_remembered(write):
    file = write("""
        server:
          host: 0.0.0.0
          port: 8001
        model: {name: qwen, dtype: float32}
    """)
    environ = {"FLUENT_SERVER__PORT": "8002", "FLUENT_MODEL__DTYPE": "bfloat16", "UNRELATED": "x"}
    loaded = load(file, {"server.port": 8003}, environ, named={"server.port": "command line, --port"})
    assert loaded.settings.server.port == 8003
    assert loaded.settings.server.host == "0.0.0.0"
    assert loaded.settings.model.dtype == "bfloat16"
    assert loaded.origins == {
        "server.host": f"{file}, line 3",
        "server.port": "command line, --port",
        "model.name": f"{file}, line 5",
        "model.dtype": "environment variable FLUENT_MODEL__DTYPE",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "kv:\n  page_size: 32\n  memory: 2GiB\nplugins: {deny: [x]}\nserver:\n"),
        ("a.toml", "[kv]\npage_size = 32\nmemory = '2GiB'\n[plugins]\ndeny = ['x']\n"),
        ("a.toml", "kv.page_size = 32\nkv.memory = '2GiB'\nplugins = {deny = ['x']}\n"),
        ("a.json", '{"kv": {"page_size": 32, "memory": "2GiB"}, "plugins": {"deny": ["x"]}}'),
        ("empty.yaml", "# nothing\n"),
    ],
)
def test_files(write, name, text):
    settings = load(write(text, name), {}, {}).settings
    if name != "empty.yaml":
        assert (settings.kv.page_size, settings.kv.memory, settings.plugins.deny) == (32, "2GiB", ["x"])
    else:
        assert settings == Settings()


def test_yaml_merges_and_plain_exponents(write):
    assert load(write("engine: {hang_timeout: 1e2}"), {}, {}).settings.engine.hang_timeout == 100.0
    merged = write("scheduler: {<<: {max_waiting: 7, prefill_tokens: 64}, max_waiting: 8}")
    scheduler = load(merged, {}, {}).settings.scheduler
    assert (scheduler.max_waiting, scheduler.prefill_tokens) == (8, 64)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("server.port", "8001", 8001),
        ("engine.deterministic", "true", True),
        ("engine.deterministic", "off", False),
        ("engine.hang_timeout", "3", 3.0),
        ("engine.threads", "null", None),
        ("engine.threads", "4", 4),
        ("server.api_key", "12345", "12345"),
        ("server.api_key", "null", None),
        ("model.name", "null", "null"),
        ("model.name", "org/name: x", "org/name: x"),
        ("plugins.deny", "a, b", ["a", "b"]),
        ("plugins.deny", "[a, b]", ["a", "b"]),
        ("plugins.deny", "", []),
        ("plugins.allow", "null", None),
    ],
)
def test_text_from_a_shell_becomes_the_settings_type(key, text, value):
    section, name = key.split(".")
    variable = f"FLUENT_{section}__{name}".upper()
    for loaded in (load(None, {key: text}, {}), load(None, {}, {variable: text})):
        assert getattr(getattr(loaded.settings, section), name) == value


@given(st.integers(0, 65535), st.text(min_size=1).filter(lambda text: text not in ("null", "~")), st.booleans())
def test_any_text_survives_as_text(port, key, flag):
    settings = load(None, {"server.port": str(port), "server.api_key": key, "log.requests": str(flag).lower()}, {}).settings
    assert (settings.server.port, settings.server.api_key, settings.log.requests) == (port, key, flag)


def test_fluent_plugins_is_the_allow_list():
    assert load(None, {}, {"FLUENT_PLUGINS": ""}).settings.plugins.allow == []
    assert load(None, {}, {}).settings.plugins.allow is None


def test_variables_that_are_not_ours_are_left_alone():
    environ = {"FLUENT_CACHE": "/c", "FLUENT_DEBUG": "1", "FLUENT_BIT_SERVICE_HOST": "10.0.0.1", "FLUENT_BIT_PORT": "tcp://x"}
    assert load(None, {}, environ).settings == Settings()


# ----------------------------------------------------------------------------------------------------------------- mistakes
def test_every_mistake_is_reported_with_line_value_and_nearest_key(write):
    file = write("""\
        server:
          prot: 8001
          host: 5
        scheduler: {max_waiting: 0}
        modle:
          name: x
        engine: fast
        policy: fcfs
        kv: {memory: 2 potatoes}
    """)
    text = mistakes(file, {"kv.pagesize": "3"}, {"FLUENT_LOG__LEVEL": "loud", "FLUENT_KW__DTYPE": "x"})
    for expected in (
        f"{file}, line 2: unknown key 'server.prot' (its value: 8001). Did you mean server.port?",
        f"{file}, line 3: server.host is 5: Expected `str`, got `int`. Give str.",
        f"{file}, line 4: scheduler.max_waiting is 0: Expected `int` >= 1. Give int ≥ 1.",
        f"{file}, line 5: unknown key 'modle' (its value: {{'name': 'x'}}). Did you mean model?",
        f"{file}, line 7: engine is a section, not a value, but 'fast' was given.",
        f"{file}, line 8: unknown key 'policy' (its value: 'fcfs'). Did you mean scheduler.policy?",
        f"{file}, line 9: kv.memory is '2 potatoes': Expected `str` of another form. Give str such as 2GiB",
        "Give str such as 2GiB, 500MB or null.",
        "environment variable FLUENT_LOG__LEVEL: log.level is 'loud': Invalid enum value 'loud'. Give one of debug, info,",
        "environment variable FLUENT_KW__DTYPE: unknown key 'kw' (its value: 'x'). Did you mean FLUENT_KV__DTYPE?",
        "override of kv.pagesize: unknown key 'kv.pagesize' (its value: '3'). Did you mean kv.page_size?",
    ):
        assert expected in text
    assert text.startswith("10 mistakes")


def test_one_mistake_has_its_fix_apart():
    with pytest.raises(ConfigError) as error:
        load(None, {"server.port": "http"}, {}, named={"server.port": "command line, --port"})
    assert error.value.message == "command line, --port: server.port is 'http': Expected `int`, got `str`."
    assert error.value.fix == "Give int ≥ 0, ≤ 65535."


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[server]\nhost = 'a'\n\nprot = 1\n", 4),
        ("server.host = 'a'\nserver.prot = 1\n", 2),
        ("[model]\nname = 'x'\n[server]\n\"prot\" = 1 # comment\n", 4),
        ("server = {prot = 1}\n", 1),
        ('server.prot = 1\nmodel.name = """\nserver.prot = 1\n"""\n', 1),
        ("[ server ]\nhost = '''\nprot'''\nprot = 1", 4),
    ],
)
def test_toml_mistakes_have_lines_too(write, text, line):
    assert f"a.toml, line {line}: unknown key 'server.prot'" in mistakes(write(text, "a.toml"), {}, {})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", "server: [\n", "a.yaml, line 2: expected the node content"),
        ("a.yaml", "- server\n", "line 1: the file is not a mapping of settings"),
        ("a.yaml", "server: {port: 1}\nserver: {port: 2}\n", "line 2: the key 'server' was given on line 1 already"),
        ("a.yaml", "1: 2\n", "line 1: the key '1' is not a string"),
        ("a.yaml", "model: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.toml", "server = \n", "not valid TOML: Invalid value (at line 1"),
        ("a.ini", "", "neither YAML nor JSON nor TOML"),
        ("a.json", '{"server": {"port": 1}', "a.json, line 1: not valid JSON: expecting ',' delimiter (column 23)"),
        ("a.json", '{\n"server" {"port": 1}}', "a.json, line 2: not valid JSON: expecting ':' delimiter (column 10)"),
        ("a.json", "server: {port: 1}", "line 1: not valid JSON: expecting value (column 1)"),
        ("a.json", '["server"]', "line 1: the file is not a mapping of settings"),
        ("a.json", '{"kv": {},\n"kv": {}}', "line 2: the key 'kv' was given on line 1 already"),
    ],
)
def test_files_that_cannot_be_read(write, name, text, expected):
    assert expected in mistakes(write(text, name), {}, {})


def test_json_may_be_indented_by_tabs(write):
    file = write('{\n\t"kv": {\n\t\t"page_size": 32,\n\t\t"memory": "2GiB"\n\t}\n}\n', "a.json")
    settings = load(file, {}, {}).settings
    assert (settings.kv.page_size, settings.kv.memory) == (32, "2GiB")
    wrong = write('{\n\t"kv": {\n\t\t"page_sise": 32\n\t}\n}\n', "b.json")
    assert "b.json, line 3: unknown key 'kv.page_sise'" in mistakes(wrong, {}, {})


def test_a_missing_file_is_an_error(tmp_path):
    assert "No such file" in mistakes(tmp_path / "none.yaml", {}, {})


def test_a_single_underscore_is_noticed():
    text = mistakes(None, {}, {"FLUENT_SERVER_PORT": "1"})
    assert text == "environment variable FLUENT_SERVER_PORT: unknown. Did you mean FLUENT_SERVER__PORT?"


def test_a_value_has_nothing_inside():
    assert "server.port has no settings inside" in mistakes(None, {"server.port.x": "1"}, {})


def test_plugin_is_no_key_of_a_file(write):
    assert "unknown key 'plugin'" in mistakes(write("plugin: {x: 1}"), {}, {})


# ---------------------------------------------------------------------------------------------------------- plugins' settings
class Inner(msgspec.Struct, forbid_unknown_fields=True):
    deep: int = 1


class Acme(msgspec.Struct, forbid_unknown_fields=True):
    """Settings of a plugin."""

    speed: Annotated[float, msgspec.Meta(gt=0, description="How fast.", extra_json_schema={"unit": "m/s"})] = 1.5
    names: list[str] = msgspec.field(default_factory=list)
    inner: Inner = msgspec.field(default_factory=Inner)

    def __post_init__(self) -> None:
        if "bad" in self.names:
            raise ValueError("names may not hold 'bad'")


class Needy(msgspec.Struct):
    url: Annotated[str, msgspec.Meta(description="Where it is.")]


STRUCTS = {"acme_fast": Acme, "needy": Needy, "plain": None}


def test_plugins_have_their_own_section(write):
    file = write("plugins:\n  deny: []\n  acme-fast:\n    speed: 3\n    inner: {deep: 4}\n")
    loaded = load(file, {}, {"FLUENT_PLUGINS__ACME_FAST__NAMES": "a,b"}, structs=STRUCTS)
    assert loaded.settings.plugin == {"acme_fast": Acme(3.0, ["a", "b"], Inner(4))}
    assert loaded.origins["plugins.acme_fast.speed"] == f"{file}, line 4"


def test_mistakes_in_a_plugins_section(write):
    file = write("plugins:\n  acme_fast:\n    speeed: 3\n    speed: -1\n  acme_slow: {}\n  plain: {x: 1}\n")
    text = mistakes(file, {}, {}, structs=STRUCTS)
    assert "line 3: unknown key 'plugins.acme_fast.speeed' (its value: 3). Did you mean plugins.acme_fast.speed?" in text
    assert "line 4: plugins.acme_fast.speed is -1: Expected `float` > 0.0. Give float > 0 (m/s)." in text
    assert "line 5: unknown key 'plugins.acme_slow' (its value: {}). Did you mean plugins.acme_fast?" in text
    assert "line 6: unknown key 'plugins.plain.x' (its value: 1). Take it away; the plugin 'plain' has no settings" in text


def test_a_structs_own_check_is_reported():
    text = mistakes(None, {"plugins.acme_fast.names": "bad"}, {}, structs=STRUCTS)
    assert "plugins.acme_fast: names may not hold 'bad'" in text


def test_what_must_be_given():
    assert load(None, {}, {}, structs=STRUCTS).settings.plugin == {"acme_fast": Acme()}
    assert load(None, {"plugins.needy.url": "http://a"}, {}, structs=STRUCTS).settings.plugin["needy"] == Needy("http://a")

    class Both(Needy):
        times: int = 1

    text = mistakes(None, {"plugins.needy.times": "2"}, {}, structs={"needy": Both})
    assert "plugins.needy.url must be given. It is str: Where it is." in text


def test_installed_plugins_are_asked_and_only_the_configured_imported(make_distribution, monkeypatch):
    monkeypatch.delenv("FLUENT_PLUGINS")
    source = """
    import msgspec
    from fluentllm.core.hookspecs import hookimpl

    class Shine(msgspec.Struct):
        level: int = 1

    class Plugin:
        @hookimpl
        def fluent_config(self, register):
            register(Shine)

    plugin = Plugin()
    """
    entries = {"polish": "acme_cfg_a:plugin [engine]", "other": "acme_cfg_b:plugin [engine]"}
    make_distribution("acme", entries, acme_cfg_a=source, acme_cfg_b="import os; os.environ['ACME_CFG_B'] = 'imported'")
    loaded = load(None, {"plugins.polish.level": "4"}, {})
    assert loaded.settings.plugin["polish"].level == 4
    assert "ACME_CFG_B" not in os.environ
    assert "unknown key 'plugins.polsh'" in mistakes(None, {"plugins.polsh.level": "4"}, {})
    excluded = mistakes(None, {"plugins.polish.level": "4", "plugins.deny": "polish"}, {})
    assert "unknown key 'plugins.polish.level'" in excluded
    assert "the plugin 'polish' has no settings, may not load (plugins.allow, plugins.deny) or cannot" in excluded


# ------------------------------------------------------------------------------------------------------------ between processes
def test_settings_travel_to_a_child_process():
    overrides = {"server.port": 9, "plugins.acme_fast.speed": 2.0, "plugins.deny": ["x"], "engine.threads": None}
    loaded = load(None, overrides, {}, structs=STRUCTS)
    assert from_json(to_json(loaded), STRUCTS | {"needy": None}) == loaded.settings
    # A process that has not loaded the plugin keeps its settings as they are.
    assert from_json(to_json(loaded)).plugin["acme_fast"]["speed"] == 2.0
    # One that has loaded a plugin without settings given fills in the defaults.
    assert from_json(to_json(load(None, {}, {}, structs={})), {"acme_fast": Acme}).plugin == {"acme_fast": Acme()}
    with pytest.raises(ConfigError, match=r"plugins\.needy do not fit.*`url`"):
        from_json(to_json(loaded), {"needy": Needy})


def test_an_engine_in_this_process_binds_its_plugins():
    settings = load(None, {"plugins.acme_fast.speed": 2.0}, {}, structs={"acme_fast": Acme, "needy": None}).settings
    given = settings.plugin["acme_fast"]
    bind(settings, {"acme_fast": Acme, "other": Acme})
    assert settings.plugin["acme_fast"] is given
    assert settings.plugin["other"] == Acme()
    with pytest.raises(ConfigError, match=r"plugins\.needy do not fit") as error:
        bind(settings, {"needy": Needy})
    assert "FLUENT_PLUGINS__NEEDY__KEY" in error.value.fix
