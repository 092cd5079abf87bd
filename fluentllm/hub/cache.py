"""The user's cache folder: where fetched models lie, one writer at a time, and known to be whole without rehashing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """`FLUENT_CACHE`, or the platform's cache folder for this user. Not created here."""
    override = os.environ.get("FLUENT_CACHE")
    if override:
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fluentllm", appauthor=False))


def model_folder(name: str) -> Path:
    """Where the files of the default `name` are kept."""
    return cache_folder() / "models" / name


def kernel_folder() -> Path:
    """Where compiled kernels are kept, so that the next start need not compile them."""
    return cache_folder() / "kernels"


def keep_kernels() -> None:
    """Let Triton, in this process and its children, keep what it compiles under `kernel_folder`, unless the user has chosen
    another place. Before it is imported."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(kernel_folder() / "triton"))


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `folder` against other processes; `waiting` is called once if another holds it now."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if waiting is not None:
            waiting()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hexadecimal digest of the file; `progress` gets the bytes done so far."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done)
    return digest.hexdigest()


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def mark_verified(path: Path, digest: str) -> None:
    """Remember that `path`, as it is now, has this digest."""
    stat = path.stat()
    temporary = _marker(path).with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}))
    temporary.replace(_marker(path))


def is_verified(path: Path, digest: str) -> bool:
    """Whether `path` was verified to have this digest and has not changed since (by size and time, not by content)."""
    try:
        known = json.loads(_marker(path).read_text())
        stat = path.stat()
    except (OSError, ValueError):
        return False
    return bool(known == {"sha256": digest, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
