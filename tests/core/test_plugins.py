"""Loading: which plugins are found, imported, refused, contained."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fluentllm.core.errors import ConfigError, PluginError
from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.discovery import discover

POLICY = """
from fluentllm.core.hookspecs import hookimpl

class Plugin:
    @hookimpl
    def fluent_schedulers(self, register):
        register("{name}", lambda context: "{name} made with " + context)

plugin = Plugin()
"""


def policy(name: str) -> str:
    return POLICY.format(name=name)


def test_a_third_party_plugin_registers_what_it_offers(make_distribution):
    make_distribution("acme", {"acme-fast": "acme_a:plugin [engine]"}, acme_a=policy("fast"))
    plugins = PluginManager.load({"engine"}, allow=["acme-fast"])
    entry = plugins.registry("schedulers").get("fast")
    assert entry.factory("this") == "fast made with this"
    assert entry.plugin == "acme_fast"
    info = plugins.info("acme_fast")
    assert (info.distribution, info.version, info.builtin, info.state) == ("acme", "1.2", False, "loaded")
    assert info.hooks == ("fluent_schedulers",)
    assert info.file.endswith("acme_a.py")


def test_only_plugins_of_the_wanted_processes_are_imported(make_distribution):
    make_distribution("acme", {"acme": "acme_b:plugin [frontend]"}, acme_b="raise SystemError('must not be imported')")
    plugins = PluginManager.load({"engine"}, allow=["acme"])
    assert plugins.info("acme").state == "found"
    assert "acme_b" not in sys.modules


def test_an_entry_without_extras_loads_everywhere(make_distribution):
    make_distribution("acme", {"acme": "acme_c:plugin"}, acme_c=policy("fast"))
    for process in ("frontend", "engine", "executor", "cli"):
        assert PluginManager.load({process}, allow=["acme"]).info("acme").state == "loaded"


def test_a_distribution_that_pip_is_removing_is_left_out(make_distribution, caplog):
    site = make_distribution("acme", {"acme": "acme_half:plugin"}, acme_half=policy("fast"))
    assert "acme" in {info.name for info in discover()}
    (site / "acme-1.2.dist-info" / "METADATA").unlink()
    assert "acme" not in {info.name for info in discover()}
    assert "'acme' is left out: its distribution is being installed or removed" in caplog.text


def test_an_unknown_process_is_an_error(make_distribution):
    make_distribution("acme", {"acme": "acme_d:plugin [engin]"}, acme_d=policy("fast"))
    with pytest.raises(
        PluginError, match=r"'acme' \(acme 1\.2\) declares the process 'engin'.*frontend, engine, executor, cli"
    ):
        PluginManager.load({"engine"})


@pytest.mark.parametrize(
    ("variable", "loaded"), [(None, {"one", "two"}), ("", set()), ("two", {"two"}), ("one, two", {"one", "two"})]
)
def test_the_environment_says_which_third_party_plugins_load(make_distribution, monkeypatch, variable, loaded):
    make_distribution(
        "acme", {"one": "acme_e:plugin [engine]", "two": "acme_f:plugin [engine]"}, acme_e=policy("e"), acme_f=policy("f")
    )
    if variable is None:
        monkeypatch.delenv("FLUENT_PLUGINS")
    else:
        monkeypatch.setenv("FLUENT_PLUGINS", variable)
    plugins = PluginManager.load({"engine"})
    assert {name for name in ("one", "two") if plugins.info(name).state == "loaded"} == loaded
    assert plugins.info("scheduler_fcfs").state == "loaded"  # built-ins always load


def test_deny_wins_and_covers_builtins(make_distribution):
    make_distribution("acme", {"acme": "acme_g:plugin [engine]"}, acme_g=policy("fast"))
    plugins = PluginManager.load({"engine"}, allow=["acme"], deny=["acme", "scheduler-fcfs"])
    assert plugins.info("acme").problem == "on the deny list"
    assert plugins.registry("schedulers").names() == []
    assert "acme_g" not in sys.modules


def test_denying_what_is_not_installed_is_said(caplog):
    PluginManager.load({"engine"}, deny=["scheduler_fcsf"])
    assert "plugins.deny names 'scheduler_fcsf', which is not installed" in caplog.text


def test_allowing_what_is_not_installed_is_an_error():
    with pytest.raises(ConfigError, match=r"'acme_missing' is to be allowed .* but is not installed"):
        PluginManager.load({"engine"}, allow=["acme_missing"])


def test_two_plugins_of_one_name_stop_the_start_naming_both(make_distribution):
    make_distribution("acme", {"same-name": "acme_h:plugin [engine]"}, acme_h=policy("h"))
    make_distribution("other", {"same_name": "acme_i:plugin [engine]"}, version="3.0", acme_i=policy("i"))
    with pytest.raises(PluginError, match=r"'same_name' \(acme 1\.2\) and plugin 'same_name' \(other 3\.0\)") as error:
        PluginManager.load({"engine"}, allow=["same-name"])
    assert "Uninstall acme or other" in error.value.fix
    PluginManager.load({"engine"}, allow=[])  # neither is wanted: no clash
    PluginManager.load({"engine"}, allow=["same-name"], deny=["same_name"])


def test_a_third_party_name_that_is_a_builtins_is_a_clash(make_distribution):
    make_distribution("acme", {"scheduler_fcfs": "acme_j:plugin [engine]"}, acme_j=policy("j"))
    with pytest.raises(PluginError, match=r"fluentllm .* and plugin 'scheduler_fcfs' \(acme 1\.2\)"):
        PluginManager.load({"engine"}, allow=["scheduler_fcfs"])


def test_a_failing_import_of_a_third_party_is_contained_and_reported(make_distribution, caplog):
    make_distribution("acme", {"broken": "acme_k:plugin [engine]"}, acme_k="import no_such_module")
    plugins = PluginManager.load({"engine"}, allow=["broken"])
    assert plugins.info("broken").state == "failed"
    assert "No module named 'no_such_module'" in plugins.info("broken").problem
    assert "plugin 'broken' (acme 1.2) is left out" in caplog.text
    assert plugins.registry("schedulers").names() == ["fcfs"]
    assert plugins.ledger.stats["broken", "import"].failures == 1


def test_a_plugin_that_wants_to_exit_is_left_out(make_distribution, caplog):
    make_distribution("acme", {"leaving": "acme_l:plugin [engine]"}, acme_l="import sys\nsys.exit(3)")
    plugins = PluginManager.load({"engine"}, allow=["leaving"])
    assert plugins.info("leaving").state == "failed"
    assert "plugin 'leaving' (acme 1.2) is left out: importing acme_l:plugin raised SystemExit: 3" in caplog.text


def test_a_failing_builtin_stops_the_start(make_distribution):
    """The distribution calls itself fluentllm and hides the real one, as a broken installation would."""
    make_distribution("fluentllm", {"bad": "acme_l:plugin [engine]"}, acme_l="1 / 0")
    with pytest.raises(PluginError, match=r"built-in plugin 'bad' .* ZeroDivisionError"):
        PluginManager.load({"engine"})
    assert PluginManager.load({"engine"}, strict=False).info("bad").state == "failed"
    assert PluginManager.load({"engine"}, deny=["bad"]).info("bad").state == "excluded"


def test_a_registration_that_breaks_off_leaves_nothing_behind(make_distribution):
    source = """
    from fluentllm.core.hookspecs import hookimpl

    class Plugin:
        @hookimpl
        def fluent_schedulers(self, register):
            register("half", lambda context: None)
            raise RuntimeError("no more")

    plugin = Plugin()
    """
    make_distribution("acme", {"half": "acme_m:plugin [engine]"}, acme_m=source)
    plugins = PluginManager.load({"engine"}, allow=["half"])
    assert plugins.info("half").state == "failed"
    assert "half" not in plugins.registry("schedulers")


def test_two_plugins_that_offer_one_thing_stop_the_start_naming_both(make_distribution):
    make_distribution("acme", {"acme": "acme_n:plugin [engine]"}, acme_n=policy("fcfs"))
    with pytest.raises(PluginError) as error:
        PluginManager.load({"engine"}, allow=["acme"])
    assert "Two plugins offer the scheduling policy 'fcfs'" in error.value.message
    assert "'scheduler_fcfs' (fluentllm" in error.value.message
    assert "'acme' (acme 1.2" in error.value.message
    assert "acme_n.py" in error.value.message


def mistaken(body: str) -> str:
    return "from fluentllm.core.hookspecs import hookimpl\n\nclass Plugin:\n" + body + "\n\nplugin = Plugin()\n"


@pytest.mark.parametrize(
    ("body", "what", "fix"),
    [
        (
            "    @hookimpl\n    def fluent_scheduler(self, register): ...",
            "implements the hook 'fluent_scheduler'",
            "fluent_schedulers",
        ),
        ("    @hookimpl\n    def fluent_step(self, plan, reslt): ...", "with the argument 'reslt'", "'result'"),
        ("    @hookimpl\n    async def fluent_step(self, plan): ...", "as an async function", "`def`"),
        ("    @hookimpl(wrapper=True)\n    def fluent_step(self, plan): yield", "wraps the hook", "plain @hookimpl"),
        ("    def fluent_step(self, plan): ...", "without a mark", "Put @hookimpl on it"),
        ("    FLUENT_API_VERSION = 99", "written for plugin API version 99", "Upgrade fluentllm"),
        ("    FLUENT_API_VERSION = 0", "written for plugin API version 0", "Upgrade acme"),
    ],
)
def test_a_break_of_the_contract_stops_the_start_with_place_and_fix(make_distribution, body, what, fix):
    make_distribution("acme", {"acme": "acme_o:plugin [engine]"}, acme_o=mistaken(body))
    with pytest.raises(PluginError) as error:
        PluginManager.load({"engine"}, allow=["acme"])
    assert what in error.value.message
    assert "acme 1.2" in error.value.message
    assert "acme_o.py" in error.value.message
    assert fix in error.value.fix


def test_the_api_version_may_stand_in_the_module(make_distribution):
    make_distribution("acme", {"acme": "acme_p:plugin [engine]"}, acme_p="FLUENT_API_VERSION = 7\n" + policy("x"))
    with pytest.raises(PluginError, match="API version 7"):
        PluginManager.load({"engine"}, allow=["acme"])


def test_a_module_can_be_a_plugin_and_a_class_cannot(make_distribution):
    make_distribution(
        "acme",
        {"acme": "acme_q [engine]", "klass": "acme_r:Plugin [engine]"},
        acme_q="from fluentllm.core.hookspecs import hookimpl\n\n@hookimpl\ndef fluent_step(result): ...\n",
        acme_r=policy("r"),
    )
    assert PluginManager.load({"engine"}, allow=["acme"]).info("acme").hooks == ("fluent_step",)
    with pytest.raises(PluginError, match="is a class"):
        PluginManager.load({"engine"}, allow=["klass"])


def test_plugins_can_be_handed_over_as_objects():
    namespace: dict = {}
    exec(policy("mine"), namespace)
    plugins = PluginManager.load({"engine"}, objects={"mine": namespace["plugin"]})
    assert plugins.registry("schedulers").names() == ["fcfs", "mine"]
    with pytest.raises(PluginError, match="Two plugins are named 'scheduler_fcfs'"):
        PluginManager.load({"engine"}, objects={"scheduler_fcfs": namespace["plugin"]})


def test_every_builtin_loads_and_none_imports_torch_to_say_what_it_offers():
    code = (
        "import sys; from fluentllm.core.plugins import PluginManager\n"
        "plugins = PluginManager.load(None)\n"
        "assert {info.state for info in plugins.infos if info.builtin} == {'loaded'}, plugins.infos\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def without_torch(monkeypatch):
    """What the test puts there goes with it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    del sys.modules["torch"]


@pytest.mark.parametrize("place", ["at its top", "in a hook"])
def test_a_plugin_that_brings_torch_into_the_front_end_is_named(make_distribution, monkeypatch, caplog, place):
    """It works; the start says who makes it slow, and so does doctor. In a process that computes nobody minds."""
    heavy = "import no_torch as torch, sys; sys.modules['torch'] = torch"
    top, body = (heavy, "") if place == "at its top" else ("", f"        {heavy}")
    source = f"""
{top}
from fluentllm.core.hookspecs import hookimpl

class Plugin:
    @hookimpl
    def fluent_routes(self, register):
        pass
{body}

plugin = Plugin()
"""
    make_distribution(
        "acme", {"acme": "acme_t:plugin", "light": "acme_u:plugin"}, acme_t=source, no_torch="", acme_u=policy("u")
    )
    for processes, warned in (({"engine"}, False), ({"frontend"}, True), (None, False)):
        without_torch(monkeypatch)
        sys.modules.pop("acme_t", None)
        caplog.clear()
        plugins = PluginManager.load(processes, allow=["acme", "light"])
        assert ("plugin 'acme' (acme 1.2" in caplog.text and "imports torch in the front end" in caplog.text) is warned
        assert plugins.info("acme").state == "loaded"
        assert plugins.info("light").burden is None
        if processes != {"engine"}:
            assert "imports torch in the front end" in plugins.info("acme").burden


def test_torch_in_an_engines_plugin_is_as_it_should_be(make_distribution, monkeypatch):
    source = "import no_torch as torch, sys; sys.modules['torch'] = torch\n" + policy("v")
    make_distribution("acme", {"acme": "acme_v:plugin [engine]"}, acme_v=source, no_torch="")
    without_torch(monkeypatch)
    assert PluginManager.load(None, allow=["acme"]).info("acme").burden is None


def test_the_trace_has_every_call_with_its_time(make_distribution):
    make_distribution("acme", {"acme": "acme_s:plugin [engine]"}, acme_s=policy("s"))
    calls: list = []
    plugins = PluginManager.load({"engine"}, allow=["acme"], trace=calls.append)
    assert [call.hook for call in calls if call.plugin == "acme"] == ["import", "fluent_schedulers"]
    assert all(call.seconds > 0 for call in calls)
    assert plugins.ledger.stats["acme", "fluent_schedulers"].calls == 1
