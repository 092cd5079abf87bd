"""The output file of a job: results in the input's order, each written once, across kills.

A result is one line, written whole and flushed. Whoever opens the file again cuts off a line that a kill left half written,
and goes on after the last whole one. A file beside it, `<output>.job`, says which job it belongs to.
"""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ..core.errors import ConfigError
from ..core.settings import Settings
from .job import Job, Result


def count_failed(path: Path) -> int:
    """Results that are errors."""
    with path.open("rb") as file:
        return sum(msgspec.json.decode(line, type=Result).error is not None for line in file)


class OutputFile:
    """`with OutputFile(path, fingerprint(job, settings)) as out: out.done, out.put(result)`. Holds a lock: one at a time."""

    def __init__(self, path: Path, identity: str) -> None:
        """Raises `ConfigError` if the output belongs to another job, or another run writes it."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.", fix="Set `output` to another file.") from None
        try:
            self._lock()
            self._claim(identity)
            self.done = self._resume()
        except BaseException:
            self._file.close()
            raise
        self._waiting: dict[int, Result] = {}

    def put(self, result: Result) -> int:
        """Results may come in any order; they are written as soon as all before them are. Returns how many were."""
        self._waiting[result.index] = result
        lines = []
        while (following := self._waiting.pop(self.done, None)) is not None:
            lines.append(msgspec.json.encode(following) + b"\n")
            self.done += 1
        if lines:
            self._file.write(b"".join(lines))
            self._file.flush()
        return len(lines)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"Another run is writing {self._path}.", fix="Wait for it, or use another output.") from None

    def _claim(self, identity: str) -> None:
        mark = self._path.with_name(self._path.name + ".job")
        if self._path.stat().st_size == 0:
            mark.write_text(identity + "\n")
        elif not mark.exists() or mark.read_text().strip() != identity:
            raise ConfigError(
                f"{self._path} holds results of another job: its input, sampling or model was not this one's.",
                fix=f"Name another output, or delete it and {mark.name}.",
            )

    def _resume(self) -> int:
        """Number of whole lines; what follows them is cut off."""
        self._file.seek(0)
        done = whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            if _index(line) != done:
                raise ConfigError(
                    f"{self._path}, line {done + 1}, is not the result with index {done}.",
                    fix="Delete the file to start again.",
                )
            done += 1
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, 2)
        return done


def _index(line: bytes) -> int | None:
    try:
        return msgspec.json.decode(line, type=Result).index
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def fingerprint(job: Job, settings: Settings) -> str:
    """What results depend on: the input's bytes, the sampling, the model and how exactly it computes, whether drafts are
    accepted at random. What the machine can bear (memory, threads, concurrency) may change between two runs of one job."""
    model = msgspec.structs.replace(settings.model, served_name=None)
    about: list[Any] = [job.sampling, model, settings.engine.deterministic, settings.kv.dtype]
    if settings.speculative.synthetic_acceptance is not None:
        about.append(settings.speculative.synthetic_acceptance)
    digest = hashlib.sha256(msgspec.json.encode(about, order="sorted"))
    with Path(job.input).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
