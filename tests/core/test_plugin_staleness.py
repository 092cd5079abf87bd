"""An editable install whose source has other entry points than pip wrote down."""

from __future__ import annotations

import json

from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.discovery import discover
from fluentllm.core.plugins.staleness import stale_entries

MODULE = "plugin = object()\n"


def source(tmp_path, **entries: str):
    root = tmp_path / "source tree"
    root.mkdir(exist_ok=True)
    lines = "".join(f'{name} = "{value}"\n' for name, value in entries.items())
    (root / "pyproject.toml").write_text(f'[project]\nname = "acme"\n[project.entry-points."fluentllm.plugins"]\n{lines}')
    return root, json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}})


def test_new_gone_and_changed_entries_are_named_with_the_command(make_distribution, tmp_path, caplog):
    root, url = source(tmp_path, same="acme_t:plugin [engine]", moved="acme_t:plugin [frontend]", new="acme_t:plugin [cli]")
    installed = {"same": "acme_t:plugin [engine]", "moved": "acme_t:plugin [cli]", "old": "acme_t:plugin [cli]"}
    make_distribution("acme", installed, direct_url=url, acme_t=MODULE)
    (stale,) = [item for item in stale_entries(discover()) if item.distribution == "acme"]
    assert "new in the source: new; gone from the source: old; changed in the source: moved" in stale.difference
    assert stale.fix == f"Reinstall it: pip install --no-deps -e '{root}'"
    PluginManager.load({"executor"}, allow=[])
    assert "acme: the installed entry points are stale" in caplog.text


def test_an_install_that_matches_its_source_is_not_stale(make_distribution, tmp_path):
    entries = {"same": "acme_t:plugin [engine]"}
    _, url = source(tmp_path, **entries)
    make_distribution("acme", entries, direct_url=url, acme_t=MODULE)
    assert [item for item in stale_entries(discover()) if item.distribution == "acme"] == []


def test_only_editable_installs_can_be_stale(make_distribution, tmp_path):
    root, _ = source(tmp_path, other="acme_t:plugin [engine]")
    make_distribution("acme", {"old": "acme_t:plugin [cli]"}, direct_url=json.dumps({"url": root.as_uri(), "dir_info": {}}))
    make_distribution("bolt", {"old2": "acme_t:plugin [cli]"})
    assert [item for item in stale_entries(discover()) if item.distribution in ("acme", "bolt")] == []


def test_folders_of_our_plugins_that_no_entry_names_are_noticed(make_distribution, tmp_path):
    root, url = source(tmp_path, known="fluentllm.plugins.known:plugin [engine]")
    for name in ("known", "forgotten"):
        (root / "fluentllm" / "plugins" / name).mkdir(parents=True)
        (root / "fluentllm" / "plugins" / name / "__init__.py").write_text("")
    make_distribution("fluentllm", {"known": "fluentllm.plugins.known:plugin [engine]"}, direct_url=url)
    (stale,) = stale_entries(discover())
    assert "no entry point names these folders of fluentllm/plugins: forgotten" in stale.difference
    assert "pip install --no-deps -e" in stale.fix


def test_an_entry_whose_module_is_gone_is_left_out_with_the_reason(make_distribution, caplog):
    make_distribution("fluentllm", {"gone": "fluentllm.plugins.gone_for_good:plugin [engine]"})
    plugins = PluginManager.load({"engine"})
    assert plugins.info("gone").state == "missing"
    assert "there is no module fluentllm.plugins.gone_for_good; reinstall fluentllm" in caplog.text


def test_this_checkout_is_not_stale():
    assert [str(item) for item in stale_entries(discover())] == []
