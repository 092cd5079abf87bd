"""A model's configuration in Hugging Face's form, from a folder's config.json or made from a GGUF's metadata."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError
from .gguf_config import config_from_header
from .gguf_file import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from .files import ModelFiles


def load_config(files: ModelFiles) -> dict[str, Any]:
    """As config.json has it; `eos_token_id` is a list: config.json's, then what generation_config.json adds.

    Raises `CheckpointError` if there is none, it is not JSON, or a GGUF's layout is not known.
    """
    return config_at(files.path)


def config_at(path: Path) -> dict[str, Any]:
    """The same, from the path alone (a folder or a .gguf file)."""
    if path.is_file():
        return config_from_header(read_header(path))
    config = _read_json(path / "config.json")
    if config is None:
        raise CheckpointError(f"{path} has no config.json.", fix="Give the folder that config.json lies in.")
    generation = _read_json(path / "generation_config.json") or {}
    ids = [*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    config["eos_token_id"] = list(dict.fromkeys(ids))
    return config


def architecture(config: dict[str, Any]) -> str:
    """The one architecture that a configuration names. Raises `CheckpointError`."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"config.json names the architectures {names!r}, not exactly one.", fix="Set `architectures`.")
    return names[0]


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object.")
    return content
