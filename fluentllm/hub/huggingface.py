"""Fetches from the Hugging Face hub what serving needs of a repository, and nothing else, into the hub's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelNotFound
from .weight_files import PYTORCH, SAFETENSORS

if TYPE_CHECKING:
    from .progress import Progress

SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
WEIGHT_FILES = [SAFETENSORS.pattern]
TORCH_FILES = [PYTORCH.pattern]
"""Asked for where a repository has no safetensors."""
IGNORED = ["consolidated*", "original/*", "metal/*", "onnx/*"]
"""Second copies of the weights in other layouts."""


def fetch_snapshot(repo: str, revision: str | None, progress: Progress, *, weights: bool, refresh: bool) -> Path:
    """A folder with configuration, tokenizer and, if asked for, weights; from the cache alone where it is complete there."""
    from huggingface_hub import snapshot_download

    patterns = SMALL_FILES + (WEIGHT_FILES if weights else [])
    if not refresh and (folder := cached_snapshot(repo, revision, weights=weights)):
        return folder
    progress(f"Fetching {repo} from the Hugging Face hub.", 0, 0)
    options = {"revision": revision, "ignore_patterns": IGNORED}
    folder = Path(_ask(repo, snapshot_download, repo, allow_patterns=patterns, **options))
    if weights and not _complete(folder):
        folder = Path(_ask(repo, snapshot_download, repo, allow_patterns=SMALL_FILES + TORCH_FILES, **options))
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"The Hugging Face repository {repo!r} has no config.json.",
            fix=f"If it holds GGUF files, name one of them: {repo}/FILE.gguf",
            param="model.name",
        )
    if weights and not _complete(folder):
        raise ModelNotFound(
            f"The Hugging Face repository {repo!r} has no complete {SAFETENSORS.pattern} or {PYTORCH.pattern} weights.",
            param="model.name",
        )
    return folder


def fetch_file(repo: str, file: str, revision: str | None, progress: Progress, *, refresh: bool) -> Path:
    """One file of a repository."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(repo, file, revision=revision)
    if not refresh and isinstance(known, str):
        return Path(known)
    progress(f"Fetching {repo}/{file} from the Hugging Face hub.", 0, 0)
    return Path(_ask(repo, hf_hub_download, repo, file, revision=revision))


def cached_snapshot(repo: str, revision: str | None, *, weights: bool = True) -> Path | None:
    """The repository's folder in the hub's cache, if all of it is there. Touches no network."""
    from huggingface_hub import try_to_load_from_cache

    known = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(known, str):
        return None
    folder = Path(known).parent
    return folder if not weights or _complete(folder) else None


def _complete(folder: Path) -> bool:
    """Whether the weights are whole: one file, or every file that the index names."""
    layout = SAFETENSORS if SAFETENSORS.read_index(folder) is not None or SAFETENSORS.present(folder) else PYTORCH
    return layout.complete(folder)


def _ask(repo: str, call: Any, *args: Any, **options: Any) -> Any:
    """Call the hub; what can go wrong there becomes an error that says what to do."""
    import httpx
    from huggingface_hub import errors

    local = "Or download it elsewhere and give the folder."
    try:
        return call(*args, **options)
    except errors.GatedRepoError as error:
        fix = f"Accept its terms at https://huggingface.co/{repo} and log in with `hf auth login` (or set HF_TOKEN). {local}"
        raise ModelNotFound(f"The Hugging Face repository {repo!r} is gated.", fix=fix, param="model.name") from error
    except errors.RepositoryNotFoundError as error:
        fix = f"Check the spelling; a private one needs `hf auth login`. {local}"
        raise ModelNotFound(f"There is no repository {repo!r} on the Hugging Face hub.", fix=fix, param="model.name") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(
            f"The Hugging Face repository {repo!r} has no revision {options.get('revision')!r}.",
            fix="Give a branch, tag or commit that exists.",
            param="model.revision",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelNotFound(f"The Hugging Face repository {repo!r} has no file {args[-1]!r}.", param="model.name") from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{repo!r} is not a Hugging Face id: {error}", param="model.name") from error
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx.HTTPError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFound(
            f"{repo!r} is not on this disk, and the Hugging Face hub could not be read: {reason}",
            fix=f"Check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT). {local}",
            param="model.name",
        ) from error
