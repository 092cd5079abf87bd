"""A real engine on dummy weights, built as the engine's process builds its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluentllm.assembly import build_engine
from fluentllm.core import config
from fluentllm.core.engine import Engine
from fluentllm.core.plugins import PluginManager
from fluentllm.hub import resolve


def build(folder: Path, plugins: Mapping[str, Any] | None = None, **more: Any) -> tuple[Engine, PluginManager]:
    """`plugins`: name → object, besides the installed ones."""
    overrides = {"model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1, "kv.memory": "64MiB"}
    settings = config.load(None, {**overrides, **more}, {}).settings
    manager = PluginManager.load({"engine", "executor"}, allow=[], objects=plugins)
    return build_engine(settings, resolve(str(folder)), manager), manager
