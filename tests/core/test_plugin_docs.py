"""The docs describe every hook, as it is."""

from __future__ import annotations

import re
from pathlib import Path

from fluentllm.core import hookspecs
from fluentllm.core.plugins import HOOK_PROCESSES, REGISTRIES
from fluentllm.core.plugins.checks import hook_arguments
from fluentllm.core.plugins.discovery import PROCESSES

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(fluent_\w+)\((.*?)\)` \|", PAGE, re.MULTILINE))


def test_every_hook_is_documented_with_its_arguments():
    assert {name: tuple(arguments.split(", ")) for name, arguments in ROWS.items()} == hook_arguments()


def test_the_docs_say_where_a_hook_is_called():
    rows = re.findall(r"^\| `(fluent_\w+)\(.*?\)` \| (.*?) \|", PAGE, re.MULTILINE)
    assert {hook: where for hook, where in rows if where in PROCESSES} == HOOK_PROCESSES


def test_every_hook_has_a_docstring_and_every_registry_a_hook():
    assert all(getattr(hookspecs, name).__doc__ for name in hook_arguments())
    assert {f"fluent_{kind}" for kind in REGISTRIES} <= hook_arguments().keys()
