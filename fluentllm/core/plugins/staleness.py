"""Notices that the installed entry points of an editable install are not those of its source any more.

Python reads entry points from what pip wrote at installation; an editable install follows the source for code, but not
for these. Used at start by `core/plugins/manager.py` and by `fluent doctor`.
"""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

from ..hookspecs import ENTRY_POINT_GROUP
from .discovery import OWN_DISTRIBUTION, PluginInfo, normalized

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib import metadata


@dataclass(frozen=True, slots=True)
class Stale:
    """A difference between source and installation, and the command that ends it."""

    distribution: str
    difference: str
    fix: str

    def __str__(self) -> str:
        return f"{self.distribution}: {self.difference} {self.fix}"


def source_root(distribution: metadata.Distribution) -> Path | None:
    """Where the source of an editable install lies; None for other installs."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return None
    record: dict[str, Any] = json.loads(text)
    url = urlparse(str(record.get("url", "")))
    if not record.get("dir_info", {}).get("editable") or url.scheme != "file":
        return None
    root = Path(url2pathname(unquote(url.path) if "%" in url.path else url.path))
    return root if root.is_dir() else None


def declared_entries(root: Path) -> dict[str, str] | None:
    """The plugin entry points that the source declares; None where its pyproject.toml does not say."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (OSError, tomllib.TOMLDecodeError):
        return None
    if "entry-points" in project.get("dynamic", []):
        return None
    entries: dict[str, str] = project.get("entry-points", {}).get(ENTRY_POINT_GROUP, {})
    return entries


def stale_entries(plugins: Iterable[PluginInfo]) -> list[Stale]:
    """Differences of every editable distribution that provides plugins."""
    distributions = {
        info.distribution: info.entry.dist for info in plugins if info.entry is not None and info.entry.dist is not None
    }
    found = []
    for name, distribution in sorted(distributions.items()):
        root = source_root(distribution)
        if root is None:
            continue
        installed = {entry.name: entry.value for entry in distribution.entry_points if entry.group == ENTRY_POINT_GROUP}
        declared = declared_entries(root)
        if declared is not None and declared != installed:
            command = f"pip install --no-deps -e {shlex.quote(str(root))}"
            found.append(Stale(name, _difference(declared, installed), f"Reinstall it: {command}"))
        if normalized(name) == OWN_DISTRIBUTION:
            found.extend(_undeclared(name, root, installed if declared is None else declared))
    return found


def _difference(declared: dict[str, str], installed: dict[str, str]) -> str:
    parts = []
    for label, names in (
        ("new in the source", declared.keys() - installed.keys()),
        ("gone from the source", installed.keys() - declared.keys()),
        ("changed in the source", {name for name in declared.keys() & installed.keys() if declared[name] != installed[name]}),
    ):
        if names:
            parts.append(f"{label}: {', '.join(sorted(names))}")
    return f"the installed entry points are stale ({'; '.join(parts)})."


def _undeclared(name: str, root: Path, declared: dict[str, str]) -> list[Stale]:
    """Folders of fluentllm/plugins that no entry point names."""
    modules = {value.split(":")[0].strip() for value in declared.values()}
    folder = root / "fluentllm" / "plugins"
    orphans = sorted(
        path.parent.name for path in folder.glob("*/__init__.py") if f"fluentllm.plugins.{path.parent.name}" not in modules
    )
    if not orphans:
        return []
    return [
        Stale(
            name,
            f"no entry point names these folders of fluentllm/plugins: {', '.join(orphans)}.",
            f'Declare them in pyproject.toml under [project.entry-points."{ENTRY_POINT_GROUP}"], '
            f"then: pip install --no-deps -e {shlex.quote(str(root))}",
        )
    ]
